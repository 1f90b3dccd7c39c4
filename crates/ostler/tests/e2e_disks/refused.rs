//! What is refused: with which exit code, and what to do instead.

use std::fs;

use crate::e2e::TestServer;
use crate::volume;

/// Fails with this code and says these words.
fn refused(server: &TestServer, code: i32, args: &[&str], words: &[&str]) {
    let said = server.fails(code, args);
    for word in words {
        assert!(said.contains(word), "ostler {args:?}: no {word:?} in {said}");
    }
}

#[test]
fn what_would_lose_or_share_data_is_refused() {
    let server = TestServer::new();
    // They boot nothing and react to nothing.
    let blank = server.file("blank.raw");
    fs::write(&blank, vec![0; 1 << 20]).unwrap();
    server.ok(&["image", "import", "blank", &blank]);
    for name in ["a", "b"] {
        server.ok(&["vm", "create", name, "--image", "blank", "--memory", "32M", "--wait"]);
    }
    server.ok(&["volume", "create", "data", "--size", "64M", "--wait"]);

    // Sizes.
    refused(&server, 2, &["volume", "resize", "data", "32M"], &["64 MiB", "32 MiB", "shrink"]);
    refused(&server, 2, &["volume", "resize", "data", "67109377"], &["67109377", "multiple of 512"]);
    refused(&server, 2, &["volume", "resize", "data", "much"], &["much", "20G"]);
    refused(&server, 2, &["volume", "resize", "data", "+16777215T"], &["64"]);
    refused(&server, 2, &["volume", "create", "odd", "--size", "1048577"], &["1048577", "multiple of 512"]);
    refused(&server, 2, &["volume", "create", "odd", "--size", "0"], &["size"]);
    refused(&server, 2, &["volume", "create", "odd"], &["size", "--size 10G"]);
    assert_eq!(volume(&server, "data").spec.size.0, 64 << 20);

    // Names.
    refused(&server, 4, &["volume", "create", "data", "--size", "1M"], &["data"]);
    refused(&server, 3, &["volume", "show", "nothing"], &["nothing"]);
    refused(&server, 3, &["volume", "delete", "nothing"], &["nothing"]);
    refused(&server, 3, &["volume", "attach", "nothing", "a"], &["nothing"]);
    refused(&server, 3, &["volume", "attach", "data", "nobody"], &["nobody"]);
    refused(&server, 3, &["volume", "create", "odd", "--snapshot", "nothing"], &["nothing"]);
    refused(&server, 3, &["snapshot", "create", "s", "--vm", "nobody"], &["nobody"]);
    refused(&server, 3, &["snapshot", "create", "s", "--volume", "nothing"], &["nothing"]);
    refused(&server, 3, &["snapshot", "revert", "nothing"], &["nothing"]);
    refused(&server, 3, &["vm", "clone", "nobody", "c"], &["nobody"]);
    refused(&server, 4, &["vm", "clone", "a", "b"], &["b"]);

    // One disk of one VM.
    server.ok(&["volume", "attach", "data", "a", "--wait"]);
    refused(&server, 4, &["volume", "attach", "data", "b"], &["VM a", "ostler volume detach"]);
    refused(&server, 4, &["volume", "delete", "data"], &["VM a", "detach"]);
    refused(&server, 4, &["volume", "detach", "a-root"], &["VM a", "ostler vm shutdown"]);
    // The same once more is no mistake.
    server.ok(&["volume", "attach", "data", "a", "--wait"]);

    // Snapshots.
    server.ok(&["snapshot", "create", "s", "--vm", "a", "--wait"]);
    refused(&server, 4, &["snapshot", "create", "s", "--vm", "a"], &["s"]);
    refused(&server, 4, &["snapshot", "revert", "s"], &["VM a", "running", "ostler vm stop"]);
    refused(&server, 2, &["volume", "create", "copy", "--snapshot", "s"], &["a-root, data"]);
    refused(&server, 2, &["volume", "create", "copy", "--snapshot", "s", "--disk", "x"], &["a-root, data"]);
    refused(
        &server,
        2,
        &["volume", "create", "copy", "--snapshot", "s", "--disk", "data", "--size", "32M"],
        &["64 MiB", "32 MiB"],
    );
    server.ok(&["volume", "create", "copy", "--snapshot", "s", "--disk", "data", "--protect", "--wait"]);
    refused(&server, 4, &["snapshot", "delete", "s"], &["copy", "--force"]);
    refused(&server, 4, &["volume", "delete", "copy"], &["protected", "--unprotect"]);

    // A disk that was detached is not put back behind its VM's back, and not deleted from under its snapshot.
    server.ok(&["vm", "stop", "a", "--wait"]);
    server.ok(&["volume", "detach", "data", "--wait"]);
    refused(&server, 4, &["snapshot", "revert", "s"], &["data", "detached", "ostler volume attach"]);
    refused(&server, 4, &["volume", "delete", "data"], &["snapshots: s", "ostler snapshot delete"]);

    server.ok(&["volume", "set", "copy", "--unprotect"]);
    server.ok(&["volume", "delete", "copy", "--wait"]);
    server.ok(&["snapshot", "delete", "s", "--wait"]);
    server.ok(&["volume", "delete", "data", "--wait"]);
    server.nothing_left();
}
