//! `~/.config/ostler/config.toml`: the servers that this person works with.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::{CliError, Result};

#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// The context in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) current: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) contexts: BTreeMap<String, Context>,
}

/// One server and who one is there.
#[derive(Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Context {
    pub(crate) host: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) token: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ca_cert: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) project: Option<String>,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("host", &self.host).finish_non_exhaustive()
    }
}

/// `$XDG_CONFIG_HOME/ostler/config.toml`, or under `~/.config`. None without a home.
pub(crate) fn path() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CONFIG_HOME").filter(|path| path.is_absolute());
    Some(base.or_else(|| Some(set("HOME")?.join(".config")))?.join("ostler/config.toml"))
}

/// What the file says; nothing when there is none.
pub(crate) fn load(path: &Path) -> Result<Config> {
    let fail = |why: String| {
        CliError::failed(format!("cannot read {}", path.display()))
            .why(why)
            .hint("correct the file or move it away; ostler context set writes a new one")
    };
    match fs::read_to_string(path) {
        Ok(text) => toml::from_str(&text).map_err(|e| {
            // Not the parser's own drawing of the line, which may hold a token.
            fail(e.message().to_owned())
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Config::default()),
        Err(error) => Err(fail(error.to_string())),
    }
}

/// Replaces the file as a whole; nobody else may read it, for it holds tokens.
pub(crate) fn save(path: &Path, config: &Config) -> Result<()> {
    let fail = |why: String| CliError::failed(format!("cannot write {}", path.display())).why(why);
    let text = toml::to_string(config).map_err(|e| fail(e.to_string()))?;
    write_private(path, text.as_bytes()).map_err(|e| fail(e.to_string()))
}

fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().ok_or_else(|| io::Error::other("no directory"))?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let beside = dir.join(format!(".config.toml.{}", std::process::id()));
    let written =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside).and_then(
            |mut file| {
                file.set_permissions(fs::Permissions::from_mode(0o600))?;
                file.write_all(bytes)?;
                file.sync_all()?;
                fs::rename(&beside, path)
            },
        );
    if written.is_err() {
        // What is left is ours and of no use.
        let _ = fs::remove_file(&beside);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_loads_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/config.toml");
        assert_eq!(load(&path).unwrap(), Config::default());
        let context = Context {
            host: "https://cloud.example".to_owned(),
            token: Some("t".to_owned()),
            ca_cert: Some("/ca.pem".into()),
            project: None,
        };
        let config =
            Config { current: Some("home".to_owned()), contexts: [("home".to_owned(), context)].into() };
        save(&path, &config).unwrap();
        save(&path, &config).unwrap();
        assert_eq!(load(&path).unwrap(), config);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_file_is_an_error_without_its_secrets() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        fs::write(&path, "[contexts.x]\nhost = 'h'\ntoken = 'hush' nonsense\n").unwrap();
        let text = load(&path).unwrap_err().text();
        assert!(text.contains("config.toml") && !text.contains("hush"), "{text}");
        fs::write(&path, "colour = 'blue'\n").unwrap();
        assert!(load(&path).unwrap_err().text().contains("colour"));
    }
}
