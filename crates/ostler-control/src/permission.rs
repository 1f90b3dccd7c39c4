//! The one place where it is decided what a caller may do.
//!
//! Every service function, of whichever dialect of the API, comes through [`decide`] with its caller before it looks
//! at anything else. Users, roles and quotas will be decided here too.

use ostler_api::token::Role;
use ostler_api::{Kind, Name, TokenId};

/// Who a caller is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// The local user that owns the server, through its unix socket.
    Local,
    /// The holder of a token.
    Token { id: TokenId, role: Role, project: Option<Name>, node: Option<Name> },
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Read,
    Create,
    Update,
    Delete,
    /// Power actions, rebuild, cancel.
    Act,
    /// Console and display: full power over the guest.
    Console,
    /// What a node's agent does for its node.
    Serve,
}

/// Whose thing it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner<'a> {
    Project(&'a Name),
    Node(&'a str),
    Cloud,
}

/// How a caller is turned down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Denied {
    /// It may not even know whether the thing exists.
    Hidden,
    /// It may know, and not do this.
    Forbidden,
}

/// Whether `who` may `verb` a `kind` that belongs to `owner`.
pub(crate) fn decide(who: &Identity, verb: Verb, kind: Kind, owner: Owner<'_>) -> Result<(), Denied> {
    match who {
        Identity::Local => Ok(()),
        Identity::Token { role, project, node, .. } => match role {
            Role::Admin => Ok(()),
            Role::Member | Role::Reader => {
                let looks = matches!(verb, Verb::Read);
                match owner {
                    Owner::Project(owner) if Some(owner) == project.as_ref() => {
                        if looks || *role == Role::Member { Ok(()) } else { Err(Denied::Forbidden) }
                    }
                    Owner::Project(_) => Err(Denied::Hidden),
                    // Nodes and tokens are the operator's; a tenant learns nothing of them.
                    Owner::Node(_) => Err(Denied::Hidden),
                    Owner::Cloud => match kind {
                        Kind::Project if looks => Ok(()),
                        _ => Err(Denied::Forbidden),
                    },
                }
            }
            Role::Node => match (owner, verb) {
                (Owner::Node(owner), Verb::Serve | Verb::Read)
                    if node.as_ref().is_some_and(|n| n == owner) =>
                {
                    Ok(())
                }
                (Owner::Cloud, _) => Err(Denied::Forbidden),
                (Owner::Node(_) | Owner::Project(_), _) => Err(Denied::Hidden),
            },
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERBS: [Verb; 7] =
        [Verb::Read, Verb::Create, Verb::Update, Verb::Delete, Verb::Act, Verb::Console, Verb::Serve];

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    fn token(role: Role, project: Option<&str>, node: Option<&str>) -> Identity {
        Identity::Token { id: TokenId::new(), role, project: project.map(name), node: node.map(name) }
    }

    #[test]
    fn a_foreign_project_is_hidden_whatever_is_asked() {
        let foreign = name("theirs");
        for who in [
            token(Role::Member, Some("ours"), None),
            token(Role::Reader, Some("ours"), None),
            token(Role::Node, None, Some("n1")),
        ] {
            for kind in Kind::ALL {
                for verb in VERBS {
                    assert_eq!(decide(&who, verb, kind, Owner::Project(&foreign)), Err(Denied::Hidden));
                }
            }
        }
    }

    #[test]
    fn a_reader_only_reads() {
        let ours = name("ours");
        let reader = token(Role::Reader, Some("ours"), None);
        for verb in VERBS {
            assert_eq!(decide(&reader, verb, Kind::Vm, Owner::Project(&ours)).is_ok(), verb == Verb::Read);
        }
    }

    #[test]
    fn a_node_serves_itself_alone() {
        let node = token(Role::Node, None, Some("n1"));
        assert!(decide(&node, Verb::Serve, Kind::Node, Owner::Node("n1")).is_ok());
        assert_eq!(decide(&node, Verb::Serve, Kind::Node, Owner::Node("n2")), Err(Denied::Hidden));
        assert_eq!(decide(&node, Verb::Update, Kind::Node, Owner::Node("n1")), Err(Denied::Hidden));
        assert_eq!(decide(&node, Verb::Create, Kind::Token, Owner::Cloud), Err(Denied::Forbidden));
    }

    #[test]
    fn tenants_have_nothing_to_do_with_nodes_and_tokens() {
        for role in [Role::Member, Role::Reader] {
            let tenant = token(role, Some("ours"), None);
            for verb in VERBS {
                assert!(decide(&tenant, verb, Kind::Node, Owner::Node("n1")).is_err());
                assert!(decide(&tenant, verb, Kind::Token, Owner::Cloud).is_err());
            }
        }
    }
}
