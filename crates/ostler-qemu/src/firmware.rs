//! UEFI firmware: where distributions keep it, and each machine's own variable store.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::StartError;

/// Code and the matching template of variables, newest layout first. Secure-boot builds are not used: they need
/// enrolled keys.
const PAIRS: [(&str, &str); 4] = [
    ("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"),
    ("OVMF_CODE.fd", "OVMF_VARS.fd"),
    ("OVMF_CODE.4m.fd", "OVMF_VARS.4m.fd"),
    ("ovmf-x86_64-4m-code.bin", "ovmf-x86_64-4m-vars.bin"),
];
/// Far more than any variable store.
const MAX_VARS: u64 = 64 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Uefi {
    pub(crate) code: PathBuf,
    pub(crate) vars_template: PathBuf,
}

/// The firmware whose variable store has the size of `vars`, when that exists already: a machine keeps the layout it
/// was made with.
pub(crate) fn find(dirs: &[PathBuf], vars: &Path) -> Result<Uefi, StartError> {
    let wanted_size = fs::metadata(vars).ok().map(|data| data.len());
    let candidates = PAIRS
        .iter()
        .flat_map(|(code, template)| dirs.iter().map(move |dir| (dir.join(code), dir.join(template))));
    for (code, vars_template) in candidates {
        let Ok(template) = fs::metadata(&vars_template) else { continue };
        if code.is_file() && wanted_size.is_none_or(|size| size == template.len()) {
            return Ok(Uefi { code, vars_template });
        }
    }
    let searched = dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", ");
    Err(StartError::FirmwareMissing { searched })
}

/// Opens the variable store, making it from the template first when it is missing. It appears whole or not at all.
pub(crate) fn open_vars(uefi: &Uefi, vars: &Path) -> io::Result<File> {
    match File::options().read(true).write(true).open(vars) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            create_vars(&uefi.vars_template, vars)?;
            File::options().read(true).write(true).open(vars)
        }
        other => other,
    }
}

fn create_vars(template: &Path, vars: &Path) -> io::Result<()> {
    let mut content = Vec::new();
    File::open(template)?.take(MAX_VARS).read_to_end(&mut content)?;
    let unfinished = vars.with_extension("partial");
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
    file.write_all(&content)?;
    file.sync_all()?;
    fs::rename(&unfinished, vars)?;
    crate::files::sync_parent(vars)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_layout_is_taken_unless_the_machine_has_an_older_one() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, size: usize| fs::write(dir.path().join(name), vec![7u8; size]).unwrap();
        for (name, size) in
            [("OVMF_CODE.fd", 10), ("OVMF_VARS.fd", 2), ("OVMF_CODE_4M.fd", 20), ("OVMF_VARS_4M.fd", 4)]
        {
            write(name, size);
        }
        let dirs = [PathBuf::from("/nonexistent"), dir.path().to_owned()];
        let vars = dir.path().join("mine");
        let uefi = find(&dirs, &vars).unwrap();
        assert!(uefi.code.ends_with("OVMF_CODE_4M.fd"));
        open_vars(&uefi, &vars).unwrap();
        assert_eq!(fs::read(&vars).unwrap(), vec![7; 4]);

        fs::write(&vars, [1, 2]).unwrap();
        let uefi = find(&dirs, &vars).unwrap();
        assert!(uefi.code.ends_with("OVMF_CODE.fd"));
        open_vars(&uefi, &vars).unwrap();
        assert_eq!(fs::read(&vars).unwrap(), [1, 2], "an existing store is kept");
    }

    #[test]
    fn missing_firmware_says_where_it_was_looked_for() {
        let error = find(&[PathBuf::from("/nonexistent")], Path::new("/nonexistent/vars")).unwrap_err();
        assert!(
            error.to_string().contains("/nonexistent") && error.to_string().contains("apt-get install ovmf")
        );
    }
}
