//! People at a VM's console: each a `vm console` process with pipes for its keyboard and screen.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::{Arc, Mutex};

use super::TestServer;
use super::wait::wait_until;

pub(crate) struct Watcher {
    child: Child,
    keyboard: Option<ChildStdin>,
    screen: Arc<Mutex<Vec<u8>>>,
}

impl TestServer {
    pub(crate) fn watch_console(&self, vm: &str) -> Watcher {
        let mut command = self.command(&["vm", "console", vm]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        let screen = Arc::new(Mutex::new(Vec::new()));
        let shown = Arc::clone(&screen);
        // Ends with the process.
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(read @ 1..) = out.read(&mut bytes) {
                shown.lock().unwrap().extend_from_slice(&bytes[..read]);
            }
        });
        Watcher { keyboard: child.stdin.take(), child, screen }
    }
}

impl Watcher {
    pub(crate) fn types(&mut self, text: &str) {
        let keyboard = self.keyboard.as_mut().expect("a keyboard");
        keyboard.write_all(text.as_bytes()).and_then(|()| keyboard.flush()).unwrap();
    }

    pub(crate) fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned()
    }

    pub(crate) fn sees(&self, text: &str) {
        wait_until(&format!("the console shows {text:?}"), || self.screen().contains(text));
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
