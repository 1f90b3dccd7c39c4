//! kill -9 in the middle of an import, at each stage: the store stays whole, nothing runs on, and a second try ends well.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use ostler_storage::{ImageStore, ImportStage};

use crate::{
    import::{gzip, options, upload},
    support::{MIB, image, noise, nothing_runs_on},
};

const STORE: &str = "OSTLER_TEST_KILLED_STORE";

/// Not a test of its own: the process that is killed. It prints each stage as it reaches it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by the test below, as the process to be killed"]
async fn victim() {
    let Some(dir) = std::env::var_os(STORE) else { return };
    let store = ImageStore::open(dir).unwrap();
    let options = options();
    let mut progress = options.progress.subscribe();
    let reporter = tokio::spawn(async move {
        let mut last = None;
        while progress.changed().await.is_ok() {
            let stage = progress.borrow_and_update().stage;
            if last.replace(stage) != Some(stage) {
                println!("stage {}", stage.as_str());
            }
        }
    });
    store.finish("u", options).await.unwrap();
    println!("stage done");
    reporter.await.unwrap();
}

/// Runs the victim and kills it a little after it has reached `stage`.
fn kill_at(dir: &Path, stage: &str, after: Duration) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "killed::victim", "--ignored", "--nocapture"])
        .env(STORE, dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let wanted = format!("stage {stage}");
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    // The test harness may write its own words before ours on the same line.
    let _ = lines.map_while(Result::ok).find(|line| line.contains(&wanted) || line.contains("stage done"));
    std::thread::sleep(after);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
async fn an_import_killed_anywhere_can_be_done_again() {
    let work = tempfile::tempdir().unwrap();
    let packed = gzip(&fs::read(image(work.path(), &noise(24 * MIB), "vmdk", &[])).unwrap());
    let expected = {
        let store = ImageStore::open(work.path().join("undisturbed")).unwrap();
        upload(&store, "u", &packed).await;
        store.finish("u", options()).await.unwrap()
    };
    let stages = [ImportStage::Checksum, ImportStage::Unpack, ImportStage::Convert, ImportStage::Store];
    let dir = work.path().join("store");
    for (round, delay) in [0, 3, 10, 25, 45, 70].into_iter().enumerate() {
        for stage in stages {
            let store = ImageStore::open(&dir).unwrap();
            upload(&store, "u", &packed).await;
            kill_at(&dir, stage.as_str(), Duration::from_millis(delay));
            nothing_runs_on(&dir);

            let store = ImageStore::open(&dir).unwrap();
            for stored in store.list().unwrap() {
                store.verify(&stored).await.expect("what has its name is whole");
            }
            for entry in fs::read_dir(&dir).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                assert!(name == "incoming" || name.starts_with(&expected.sha256), "{name} is left over");
            }
            let again = store.finish("u", options()).await.unwrap();
            assert_eq!(again, expected, "round {round}, {stage:?}");
            assert_eq!(store.sweep(&[]).await.unwrap(), ["u"]);
            assert_eq!(fs::read_dir(dir.join("incoming")).unwrap().count(), 0);
            store.delete(&again.image_ref()).await.unwrap();
        }
    }
}
