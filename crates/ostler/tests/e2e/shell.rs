//! The guest's root shell at its serial console: commands typed there, and what they said.

use std::sync::atomic::{AtomicU32, Ordering};

use super::TestServer;
use super::wait::{wait_for, wait_until};

impl TestServer {
    /// Waits for the prompt of a guest that boots.
    pub(crate) fn prompt(&self, vm: &str) {
        wait_until(&format!("{vm} has a shell"), || self.log(vm).contains("ostler-guest# "));
    }

    /// Runs a command in the guest; what it said, on one line. It must end well.
    pub(crate) fn shell(&self, vm: &str, command: &str) -> String {
        let (code, said) = self.shell_ends(vm, command);
        assert_eq!(code, 0, "{vm}: {command}\n{said}");
        said
    }

    /// The same however it ends, with its exit code.
    fn shell_ends(&self, vm: &str, command: &str) -> (i32, String) {
        static RUN: AtomicU32 = AtomicU32::new(0);
        self.prompt(vm);
        let run = format!("run={}", RUN.fetch_add(1, Ordering::Relaxed));
        let mut console = self.watch_console(vm);
        // Unquoted: its lines become one. Said three times: now and then a character comes twice out of the serial port.
        console.types(&format!(
            "\nsaid=$({{ {command}; }} 2>&1); code=$?; for time in 1 2 3; do mark ended {run} code=$code said= $said .; done\n"
        ));
        let end = format!(" {run} code=");
        wait_for(&format!("{vm} has done: {command}"), || {
            let log = self.log(vm).replace('\r', "\n");
            // The dot says that the line is whole.
            let lines = log.lines().filter(|line| line.starts_with("OSTLER-GUEST ended "));
            let said: Vec<_> =
                lines.filter_map(|line| Some(line.strip_suffix(" .")?.split_once(&end)?.1)).collect();
            let twice = said.iter().enumerate().find(|(index, line)| said[..*index].contains(line))?.1;
            let (code, said) = twice.split_once(" said=")?;
            Some((code.parse().ok()?, said.trim().to_owned()))
        })
    }

    /// Writes a word over and over into 64 KiB of a disk of the guest's, down to the host's file.
    pub(crate) fn disk_write(&self, vm: &str, disk: &str, at_mib: u64, word: &str) {
        self.shell(vm, &disk_write(disk, at_mib, 64, word));
    }

    /// Those 64 KiB read as they were written, from the disk and not from memory.
    pub(crate) fn disk_holds(&self, vm: &str, disk: &str, at_mib: u64, word: &str) {
        self.disk_holds_all(vm, disk, &[(at_mib, word)]);
    }

    pub(crate) fn disk_holds_all(&self, vm: &str, disk: &str, words: &[(u64, &str)]) {
        let places: String = words.iter().map(|(at, word)| format!(" {at}:{word}")).collect();
        // Short: the guest's shell reads lines of a thousand characters.
        let check = format!(
            "sync; blockdev --flushbufs /dev/{disk}; for place in{places}; do \
             there=$(dd if=/dev/{disk} bs=64k skip=$((${{place%%:*}} * 16)) count=1 2>/dev/null | sha256sum); \
             right=$(yes ${{place#*:}} | head -c 65536 | sha256sum); \
             [ \"$there\" = \"$right\" ] || echo $place; done"
        );
        let differ = self.shell(vm, &check);
        assert_eq!(differ, "", "{vm}: not on {disk} as MIB:WORD");
    }

    /// The same for the file on the root disk that `ostler-write` wrote.
    pub(crate) fn root_holds(&self, vm: &str, word: &str) {
        let said = self.shell(vm, "ostler-verify; head -n 1 /var/lib/ostler/pattern");
        assert_eq!(said, word, "{vm}");
    }

    /// The serial numbers of the guest's disks, by their names.
    pub(crate) fn serials(&self, vm: &str) -> Vec<(String, String)> {
        let said = self.shell(vm, "cd /sys/block; for disk in vd*; do echo $disk $(cat $disk/serial); done");
        let words: Vec<_> = said.split_whitespace().map(str::to_owned).collect();
        words.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect()
    }

    /// Waits until the guest's kernel has these disks and no others.
    pub(crate) fn guest_has(&self, vm: &str, disks: &str) {
        wait_until(&format!("{vm} has {disks}"), || self.shell(vm, "cd /sys/block; echo vd*") == disks);
    }
}

/// The guest's command that writes `kib`, a multiple of 64.
pub(crate) fn disk_write(disk: &str, at_mib: u64, kib: u64, word: &str) -> String {
    format!(
        "yes {word} | dd of=/dev/{disk} bs=64k seek={} count={} iflag=fullblock conv=fsync 2>/dev/null",
        at_mib * 16,
        kib / 64
    )
}
