//! Where things are in the store.
//!
//! ```text
//! r/KIND/PROJECT/ID        a resource ('-' as project for what belongs to the whole cloud)
//! n/KIND/PROJECT/NAME      its name, so that names are unique: the value is the id
//! idem/CALLER/KEY          what an idempotency key made
//! live/NODE                exists while the node sends heartbeats (leased)
//! sys/leader               the acting controller (leased)
//! sys/cloud                this cloud's id
//! ```

use ostler_api::{Kind, Name, Resource};
use uuid::Uuid;

pub(crate) const RESOURCES: &str = "r/";
pub(crate) const IDEMPOTENCY: &str = "idem/";
pub(crate) const LIVE: &str = "live/";
pub(crate) const LEADER: &str = "sys/leader";
pub(crate) const CLOUD: &str = "sys/cloud";

fn project(project: Option<&Name>) -> &str {
    project.map_or("-", Name::as_str)
}

pub(crate) fn resource<T: Resource>(object: &T) -> String {
    let metadata = object.metadata();
    format!("r/{}/{}/{}", T::KIND, project(metadata.project.as_ref()), metadata.id)
}

pub(crate) fn name<T: Resource>(object: &T) -> String {
    let metadata = object.metadata();
    format!("n/{}/{}/{}", T::KIND, project(metadata.project.as_ref()), metadata.name)
}

pub(crate) fn live(node: &str) -> String {
    format!("{LIVE}{node}")
}

/// The prefix of all resources of a kind.
pub(crate) fn kind(kind: Kind) -> String {
    format!("r/{kind}/")
}

/// Takes a resource's key apart.
pub(crate) fn parse(key: &str) -> Option<(Kind, Uuid)> {
    let mut parts = key.strip_prefix(RESOURCES)?.split('/');
    let kind = parts.next()?.parse().ok()?;
    let _project = parts.next()?;
    let id = Uuid::parse_str(parts.next()?).ok()?;
    parts.next().is_none().then_some((kind, id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ostler_api::Metadata;
    use ostler_api::project::Project;

    #[test]
    fn keys_come_apart_as_they_were_made() {
        let project =
            Project { metadata: Metadata::new(Uuid::now_v7(), Name::new("default").unwrap(), None) };
        let key = resource(&project);
        assert_eq!(parse(&key), Some((Kind::Project, project.metadata.id)));
        assert!(key.starts_with(&kind(Kind::Project)));
        assert_eq!(name(&project), "n/project/-/default");
        for bad in ["", "r/", "r/vm/default", "r/vm/default/x", "n/vm/default/a", "r/nope/-/x"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
