//! Which server, as whom: from flags, environment, context, or the sockets of this machine, in this order.

use std::path::{Path, PathBuf};

use ostler_client::{Ca, Credentials, Target};

use super::Globals;
use super::config::{Config, Context};
use super::error::{CliError, Result};
use crate::data_dir::SOCKET;

#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) target: Target,
    pub(crate) credentials: Credentials,
    pub(crate) project: Option<String>,
}

/// `usable` says whether a socket is there and may be connected to; `dirs` is where one may be.
pub(crate) fn resolve(
    globals: &Globals,
    config: &Config,
    dirs: &[PathBuf],
    usable: impl Fn(&Path) -> bool,
) -> Result<Endpoint> {
    let context = context_of(globals, config)?;
    let host = globals.host.as_deref().filter(|host| !host.is_empty());
    let target = match (host, context) {
        (Some(host), _) => parse(host)?,
        (None, Some(context)) => parse(&context.host)?,
        (None, None) => Target::Unix(socket(dirs, usable)),
    };
    // A context's token is for the context's server and must not be shown to any other.
    let context = context.filter(|context| host.is_none_or(|host| host == context.host));
    let token = globals.token.clone().or_else(|| context?.token.clone()).filter(|token| !token.is_empty());
    let ca = globals.ca_cert.clone().or_else(|| context?.ca_cert.clone());
    let project =
        globals.project.clone().or_else(|| context?.project.clone()).filter(|name| !name.is_empty());
    Ok(Endpoint {
        target: target.with_ca(ca.map_or(Ca::System, Ca::File)),
        credentials: token.map_or_else(Credentials::none, Credentials::token),
        project,
    })
}

/// The context that was named, else the current one.
fn context_of<'a>(globals: &Globals, config: &'a Config) -> Result<Option<&'a Context>> {
    let Some(name) = globals.context.as_ref().filter(|name| !name.is_empty()).or(config.current.as_ref())
    else {
        return Ok(None);
    };
    match config.contexts.get(name) {
        Some(context) => Ok(Some(context)),
        None => Err(CliError::usage(format!("there is no context {name:?}"))
            .hint("see them with: ostler context list; make one with: ostler context set NAME --host URL")),
    }
}

fn parse(host: &str) -> Result<Target> {
    host.parse().map_err(|e: ostler_client::TargetError| {
        CliError::usage("the server's address is wrong").why(e.to_string())
    })
}

/// The first that can be used; else the first, whose absence the error will name.
fn socket(dirs: &[PathBuf], usable: impl Fn(&Path) -> bool) -> PathBuf {
    let mut sockets = dirs.iter().map(|dir| dir.join(SOCKET));
    let first = sockets.next().unwrap_or_else(|| Path::new("/var/lib/ostler").join(SOCKET));
    if usable(&first) { first } else { sockets.find(|path| usable(path)).unwrap_or(first) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::output::Format;

    fn globals() -> Globals {
        Globals {
            output: Format::Table,
            host: None,
            token: None,
            ca_cert: None,
            project: None,
            context: None,
        }
    }

    fn config() -> Config {
        let context = |host: &str, token: &str| Context {
            host: host.to_owned(),
            token: Some(token.to_owned()),
            ca_cert: None,
            project: Some("lab".to_owned()),
        };
        Config {
            current: Some("home".to_owned()),
            contexts: [
                ("home".to_owned(), context("https://home.example", "home-token")),
                ("work".to_owned(), context("https://work.example", "work-token")),
            ]
            .into(),
        }
    }

    fn token(endpoint: &Endpoint) -> Option<&str> {
        endpoint.credentials.token.as_ref().map(ostler_client::Secret::expose)
    }

    #[test]
    fn the_current_context_counts_unless_another_is_named() {
        let endpoint = resolve(&globals(), &config(), &[], |_| true).unwrap();
        assert_eq!(endpoint.target.to_string(), "https://home.example");
        assert_eq!(token(&endpoint), Some("home-token"));
        assert_eq!(endpoint.project.as_deref(), Some("lab"));
        let named = Globals { context: Some("work".to_owned()), ..globals() };
        let endpoint = resolve(&named, &config(), &[], |_| true).unwrap();
        assert_eq!(token(&endpoint), Some("work-token"));
        let unknown = Globals { context: Some("moon".to_owned()), ..globals() };
        assert_eq!(resolve(&unknown, &config(), &[], |_| true).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn a_context_s_token_goes_to_its_own_server_only() {
        let elsewhere = Globals { host: Some("https://evil.example".to_owned()), ..globals() };
        let endpoint = resolve(&elsewhere, &config(), &[], |_| true).unwrap();
        assert_eq!(endpoint.target.to_string(), "https://evil.example");
        assert_eq!(token(&endpoint), None);
        let same = Globals { host: Some("https://home.example".to_owned()), ..globals() };
        assert_eq!(token(&resolve(&same, &config(), &[], |_| true).unwrap()), Some("home-token"));
    }

    #[test]
    fn without_any_word_it_is_this_machine_s_socket() {
        let dirs = [PathBuf::from("/var/lib/ostler"), PathBuf::from("/home/a/.local/share/ostler")];
        let none = Config::default();
        let of =
            |usable: fn(&Path) -> bool| resolve(&globals(), &none, &dirs, usable).unwrap().target.to_string();
        assert_eq!(of(|_| true), "unix:///var/lib/ostler/ostler.sock");
        assert_eq!(of(|path| path.starts_with("/home")), "unix:///home/a/.local/share/ostler/ostler.sock");
        assert_eq!(of(|_| false), "unix:///var/lib/ostler/ostler.sock");
    }

    #[test]
    fn a_bad_address_is_a_usage_error_that_says_what_is_good() {
        let bad = Globals { host: Some("http://10.0.0.1".to_owned()), ..globals() };
        let error = resolve(&bad, &Config::default(), &[], |_| true).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.text().contains("https://"), "{}", error.text());
    }
}
