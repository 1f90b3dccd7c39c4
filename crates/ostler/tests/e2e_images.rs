//! Images in and out: every source and format, what breaks off and goes on, and what is refused.

#[path = "e2e/mod.rs"]
mod e2e;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use e2e::{TestServer, guest_file, wait_for, wait_until};
use ostler_api::image::{Image, ImageData, ImageFormat, ImagePhase};
use sha2::{Digest, Sha256};

/// Runs a program that must succeed.
fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn sha256(path: &str) -> String {
    let mut hash = Sha256::new();
    std::io::copy(&mut File::open(path).unwrap(), &mut hash).unwrap();
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A disk of 8 MiB with a pattern in its middle.
fn raw_disk(server: &TestServer) -> String {
    let path = server.file("disk.raw");
    let mut bytes = vec![0; 8 << 20];
    for (index, byte) in bytes[2 << 20..4 << 20].iter_mut().enumerate() {
        *byte = (index % 251) as u8;
    }
    fs::write(&path, bytes).unwrap();
    path
}

fn image(server: &TestServer, name: &str) -> Image {
    server.json(&["image", "show", name])
}

/// What is known of an image that must be active.
fn data(server: &TestServer, name: &str) -> ImageData {
    let image = image(server, name);
    assert_eq!(image.status.phase, ImagePhase::Active, "{:?}", image.status.reason);
    image.status.data.expect("data")
}

/// An exported file has the same content as `original`.
fn exports_as(server: &TestServer, name: &str, format: &str, original: &str) {
    let file = server.file(&format!("{name}.exported.{format}"));
    server.ok(&["image", "export", name, &file, "--format", format, "--force"]);
    // qemu-img calls two of them by other names.
    let driver = if format == "vhdx" { "vhdx" } else { format };
    run("qemu-img", &["compare", "-f", "raw", "-F", driver, original, &file]);
}

#[test]
fn every_format_comes_in_and_goes_out_with_the_same_content() {
    let server = TestServer::new();
    let raw = raw_disk(&server);
    for (format, driver) in
        [("raw", "raw"), ("qcow2", "qcow2"), ("vmdk", "vmdk"), ("vdi", "vdi"), ("vhdx", "vhdx")]
    {
        let file = server.file(&format!("disk.{format}"));
        if format != "raw" {
            run("qemu-img", &["convert", "-f", "raw", "-O", driver, &raw, &file]);
        }
        let name = format!("from-{format}");
        server.ok(&["image", "import", &name, &file, "--sha256", &sha256(&file)]);
        let data = data(&server, &name);
        assert_eq!(data.source_format, format.parse::<ImageFormat>().unwrap());
        assert_eq!(data.virtual_size.bytes(), 8 << 20);
        assert_eq!(data.source_sha256, sha256(&file));
        exports_as(&server, &name, "raw", &raw);
    }
    for format in ["qcow2", "vmdk", "vdi", "vhdx"] {
        exports_as(&server, "from-raw", format, &raw);
    }
    let again = server.fails(4, &["image", "export", "from-raw", &raw]);
    assert!(again.contains("--force"), "{again}");
    server.nothing_left();
}

#[test]
fn compressed_and_piped_sources_are_unpacked() {
    let server = TestServer::new();
    let raw = raw_disk(&server);
    for (program, suffix) in [("gzip", "gz"), ("xz", "xz"), ("zstd", "zst")] {
        run(program, &["--keep", "--quiet", &raw]);
        server.ok(&["image", "import", suffix, &format!("{raw}.{suffix}")]);
        exports_as(&server, suffix, "raw", &raw);
    }
    let mut import = server.command(&["image", "import", "piped", "-"]);
    let status = import.stdin(File::open(&raw).unwrap()).status().unwrap();
    assert!(status.success());
    exports_as(&server, "piped", "raw", &raw);
    server.nothing_left();
}

#[test]
fn what_is_damaged_or_refers_elsewhere_is_refused_with_why() {
    let server = TestServer::new();
    let raw = raw_disk(&server);
    let (backed, external) = (server.file("backed.qcow2"), server.file("external.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &raw, "-F", "raw", &backed]);
    let options = format!("data_file={},data_file_raw=on", server.file("elsewhere.raw"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, &external, "8M"]);
    let cut = server.file("cut.qcow2");
    fs::write(&cut, &fs::read(guest_file("ostler-guest.qcow2")).unwrap()[..4096]).unwrap();
    let wrong = "0".repeat(64);
    for (name, args, words) in [
        ("backed", vec![backed.as_str()], "backing file"),
        ("external", vec![&external], "external file"),
        ("cut", vec![&cut], ""),
        ("mixed-up", vec![&raw, "--sha256", &wrong], "sha256"),
    ] {
        let said = server.fails(1, &[&["image", "import", name], &args[..]].concat()).to_lowercase();
        assert!(said.replace('-', "").contains(words), "{name}: {said}");
        let image = image(&server, name);
        assert_eq!(image.status.phase, ImagePhase::Error);
        assert!(image.status.reason.is_some());
        let vm = server.cli(&["vm", "create", "a", "--image", name]);
        assert_ne!(vm.code, 0, "a VM was made from {name}");
        server.ok(&["image", "delete", name, "--wait"]);
    }
    let missing = server.fails(1, &["image", "import", "missing", &server.file("nowhere")]);
    assert!(missing.contains("nowhere"), "{missing}");
    server.fails(3, &["image", "show", "missing"]);
    server.nothing_left();
}

/// Answers each request with the file, in a thread that ends with the test.
fn serve_file(path: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/disk.raw", listener.local_addr().unwrap());
    let bytes = fs::read(path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|read| read == 1) {
                request.push(byte[0]);
            }
            let head =
                format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", bytes.len());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&bytes));
        }
    });
    url
}

#[test]
fn a_url_is_fetched_and_a_private_one_only_when_allowed() {
    let mut server = TestServer::new();
    let raw = raw_disk(&server);
    let url = serve_file(&raw);
    let refused = server.fails(1, &["image", "import", "private", &url]);
    assert!(refused.contains("127.0.0.1"), "{refused}");
    server.ok(&["image", "delete", "private", "--wait"]);

    assert!(server.sigterm().success());
    server.settings("[images]\nfetch_private = true\n");
    server.start();
    server.ok(&["image", "import", "fetched", &url, "--sha256", &sha256(&raw)]);
    exports_as(&server, "fetched", "raw", &raw);
    server.nothing_left();
}

/// Bytes of an upload that the server says it has.
fn offset(server: &TestServer, name: &str) -> Option<u64> {
    let answer = server.http("GET", &format!("/v1/images/{name}/upload"))?;
    (answer.status == 200).then(|| answer.json()["offset"].as_u64().unwrap())
}

#[test]
fn an_upload_goes_on_where_kill_9_broke_it_off() {
    let mut server = TestServer::new();
    let path = guest_file("vmlinux");
    let bytes = fs::read(&path).unwrap();
    assert_eq!(server.post("/v1/images", r#"{"name": "half"}"#).status, 201);
    // Half of a body that says it is the whole.
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    let head = format!(
        "PUT /v1/images/half/upload?offset=0&last=true HTTP/1.1\r\nhost: ostler\r\ncontent-length: {}\r\n\r\n",
        bytes.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&bytes[..bytes.len() / 2]).unwrap();
    let written = || {
        let files = fs::read_dir(server.data().join("images/incoming")).unwrap().flatten();
        files.filter_map(|file| file.metadata().ok()).map(|data| data.len()).max().unwrap_or(0)
    };
    let half = bytes.len() as u64 / 2;
    wait_until("the half has arrived", || written() == half);
    server.restart();
    assert_eq!(offset(&server, "half"), Some(half));
    let said = server.cli(&["image", "import", "half", path.to_str().unwrap(), "--resume"]);
    assert_eq!(said.code, 0, "{}", said.stderr);
    assert!(said.stderr.contains("going on after"), "{}", said.stderr);
    assert_eq!(data(&server, "half").source_sha256, sha256(path.to_str().unwrap()));
    server.nothing_left();
}

#[test]
fn a_running_import_survives_the_death_of_the_server() {
    let mut server = TestServer::new();
    let path = guest_file("vmlinux");
    let bytes = fs::read(&path).unwrap();
    let mut import = server.command(&["image", "import", "piped", "-"]);
    let mut import = import.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut pipe = import.stdin.take().unwrap();
    let (first, second) = bytes.split_at(bytes.len() / 2);
    pipe.write_all(first).unwrap();
    wait_for("some of it is there", || offset(&server, "piped").filter(|offset| *offset > 0));
    server.restart();
    pipe.write_all(second).unwrap();
    drop(pipe);
    let output = import.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(data(&server, "piped").source_sha256, sha256(path.to_str().unwrap()));
    server.nothing_left();
}

#[test]
fn an_image_in_use_stays() {
    let server = TestServer::new();
    server.import_guest();
    server.ok(&["vm", "create", "a", "--image", "guest", "--no-start", "--wait"]);
    let used = server.fails(4, &["image", "delete", "guest", "--wait"]);
    assert!(used.contains("use"), "{used}");
    assert_eq!(image(&server, "guest").status.phase, ImagePhase::Active);
    server.ok(&["vm", "delete", "a", "--wait"]);
    server.ok(&["image", "delete", "guest", "--wait"]);
    let stored = || {
        let files = fs::read_dir(server.data().join("images")).unwrap().flatten();
        files.filter(|file| file.path().is_file()).count()
    };
    wait_until("the stored file goes", || stored() == 0);
    server.nothing_left();
}
