//! Whom QEMU runs as: with [`QemuUser::PerMachine`] each machine gets a user id of its own, so that a guest which breaks
//! out of one QEMU has no rights over another. The owner of a machine's lock file records its id.

use std::collections::HashMap;
use std::path::Path;

use parking_lot::Mutex;
use uuid::Uuid;

use crate::config::QemuUser;
use crate::error::StartError;
use crate::rundir::{self, RunDir};

#[derive(Debug)]
pub(super) struct Users {
    range: Option<(u32, u32)>,
    /// Read from the run directory when it is first needed.
    taken: Mutex<Option<HashMap<Uuid, u32>>>,
}

impl Users {
    pub(super) fn new(user: QemuUser) -> Self {
        let range = match user {
            QemuUser::PerMachine { first_uid, count } if rustix::process::geteuid().is_root() => {
                Some((first_uid, count))
            }
            QemuUser::PerMachine { .. } | QemuUser::Same => None,
        };
        Self { range, taken: Mutex::new(None) }
    }

    /// The id of a machine: the one it had before, else the lowest free one. None when QEMU runs as the agent does.
    pub(super) fn assign(&self, run_dir: &Path, id: Uuid) -> Result<Option<u32>, StartError> {
        let Some((first, count)) = self.range else { return Ok(None) };
        let range = first..first.saturating_add(count);
        let mut guard = self.taken.lock();
        let taken = match &mut *guard {
            Some(taken) => taken,
            unread => unread.insert(read(run_dir)?),
        };
        if let Some(uid) = taken.get(&id).filter(|uid| range.contains(uid)) {
            return Ok(Some(*uid));
        }
        let used: std::collections::HashSet<u32> = taken.values().copied().collect();
        let uid =
            range.into_iter().find(|uid| !used.contains(uid)).ok_or(StartError::NoFreeUser { count })?;
        taken.insert(id, uid);
        Ok(Some(uid))
    }

    /// The machine's directory is gone.
    pub(super) fn release(&self, id: Uuid) {
        if let Some(taken) = &mut *self.taken.lock() {
            taken.remove(&id);
        }
    }
}

fn read(run_dir: &Path) -> Result<HashMap<Uuid, u32>, StartError> {
    let failed = |error| StartError::Io {
        what: "reading the user ids in use".into(),
        source: std::io::Error::other(error),
    };
    let mut taken = HashMap::new();
    for id in rundir::list(run_dir).map_err(failed)? {
        if let Some(uid) = RunDir::open(run_dir, id).map_err(failed)?.and_then(|dir| dir.lock_owner()) {
            taken.insert(id, uid);
        }
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_lasting_unique_and_run_out() {
        let dir = tempfile::tempdir().unwrap();
        let users = Users { range: Some((7000, 2)), taken: Mutex::new(None) };
        let id = Uuid::from_u128;
        assert_eq!(users.assign(dir.path(), id(1)).unwrap(), Some(7000));
        assert_eq!(users.assign(dir.path(), id(2)).unwrap(), Some(7001));
        assert_eq!(users.assign(dir.path(), id(1)).unwrap(), Some(7000));
        assert!(matches!(users.assign(dir.path(), id(3)), Err(StartError::NoFreeUser { count: 2 })));
        users.release(id(1));
        assert_eq!(users.assign(dir.path(), id(3)).unwrap(), Some(7000));
    }
}
