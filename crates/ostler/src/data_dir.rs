//! Where a server keeps its state when nobody says otherwise, and so where a client finds its socket.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Name of the unix socket within the data directory.
pub(crate) const SOCKET: &str = "ostler.sock";

const SYSTEM: &str = "/var/lib/ostler";

/// For root `/var/lib/ostler`, for anybody else `~/.local/share/ostler`. None without a home.
pub(crate) fn default_data_dir() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() { Some(SYSTEM.into()) } else { own(std::env::var_os("HOME")) }
}

/// Where a server may be, the likeliest first.
pub(crate) fn candidates(chosen: Option<OsString>, home: Option<OsString>) -> Vec<PathBuf> {
    match chosen.filter(|dir| !dir.is_empty()) {
        Some(dir) => vec![dir.into()],
        None => std::iter::once(PathBuf::from(SYSTEM)).chain(own(home)).collect(),
    }
}

fn own(home: Option<OsString>) -> Option<PathBuf> {
    let home = home.filter(|home| !home.is_empty())?;
    Some(Path::new(&home).join(".local/share/ostler"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chosen_directory_is_the_only_one() {
        assert_eq!(candidates(Some("/x".into()), Some("/home/a".into())), [PathBuf::from("/x")]);
        let all = candidates(Some("".into()), Some("/home/a".into()));
        assert_eq!(all, [PathBuf::from(SYSTEM), PathBuf::from("/home/a/.local/share/ostler")]);
        assert_eq!(candidates(None, None), [PathBuf::from(SYSTEM)]);
    }
}
