//! Lists and watches.

use futures::StreamExt;
use ostler_api::ErrorCode;
use ostler_api::list::{ListParams, WatchLine};
use ostler_api::vm::{Vm, VmPatch};

use super::PATIENCE;
use crate::testing::{TestCloud, name};

async fn make(test: &TestCloud, vm: &str, tier: &str) {
    let mut request = TestCloud::create(vm);
    request.labels.insert("tier".into(), tier.into());
    request.start = false;
    test.cloud.vm_create(&test.admin, None, request, None).await.unwrap();
}

#[tokio::test]
async fn pages_hold_everything_once() {
    let test = TestCloud::new().await;
    test.image("img").await;
    for index in 0..7 {
        make(&test, &format!("v{index}"), if index % 2 == 0 { "even" } else { "odd" }).await;
    }
    let mut params = ListParams { limit: Some(3), ..ListParams::default() };
    let mut names = Vec::new();
    loop {
        let page = test.cloud.list::<Vm>(&test.admin, &params).unwrap();
        assert!(page.items.len() <= 3);
        names.extend(page.items.iter().map(|vm| vm.metadata.name.to_string()));
        params.after = page.next;
        if params.after.is_none() {
            break;
        }
    }
    assert_eq!(names, (0..7).map(|index| format!("v{index}")).collect::<Vec<_>>());
    let count = |params: ListParams| test.cloud.list::<Vm>(&test.admin, &params).unwrap().items.len();
    assert_eq!(count(ListParams { label: Some("tier=even".into()), ..ListParams::default() }), 4);
    assert_eq!(count(ListParams { phase: Some("stopped,error".into()), ..ListParams::default() }), 7);
    assert_eq!(count(ListParams { phase: Some("running".into()), ..ListParams::default() }), 0);
    assert_eq!(count(ListParams { name: Some("v3".into()), ..ListParams::default() }), 1);
    assert_eq!(count(ListParams { node: Some("n9".into()), ..ListParams::default() }), 0);
    for bad in [Some(0), Some(100_000)] {
        let error = test.cloud.list::<Vm>(&test.admin, &ListParams { limit: bad, ..ListParams::default() });
        assert_eq!(error.unwrap_err().code, ErrorCode::Invalid);
    }
}

/// What a watch says, as `KIND NAME`.
fn word(line: WatchLine<std::sync::Arc<Vm>>) -> String {
    match line {
        WatchLine::Added { object } => format!("added {}", object.metadata.name),
        WatchLine::Modified { object } => format!("modified {}", object.metadata.name),
        WatchLine::Deleted { object } => format!("deleted {}", object.metadata.name),
        WatchLine::Synced { .. } => "synced".to_owned(),
        WatchLine::Bookmark { .. } => "bookmark".to_owned(),
        WatchLine::Error { problem } => format!("error {}", problem.code),
    }
}

#[tokio::test]
async fn a_watch_follows_what_enters_and_leaves_its_filter() {
    let test = TestCloud::new().await;
    test.image("img").await;
    make(&test, "a", "web").await;
    let from = test.cloud.revision() + 1;
    let filter = ListParams { label: Some("tier=web".into()), ..ListParams::default() };
    let mut now = test.cloud.watch::<Vm>(&test.admin, &filter).await.unwrap();
    make(&test, "b", "db").await;
    make(&test, "c", "web").await;
    let label = |tier: &str| VmPatch {
        labels: Some([("tier".to_owned(), tier.to_owned())].into()),
        ..VmPatch::default()
    };
    test.cloud.vm_patch(&test.admin, None, "b", None, label("web")).await.unwrap();
    test.cloud.vm_patch(&test.admin, None, "a", None, label("db")).await.unwrap();
    let rename = VmPatch { name: Some(name("d")), ..VmPatch::default() };
    test.cloud.vm_patch(&test.admin, None, "c", None, rename).await.unwrap();
    test.cloud.vm_delete(&test.admin, None, "d", None, false).await.unwrap();
    let changes = ["added c", "added b", "deleted a", "modified d", "deleted d"];
    let mut wanted = vec!["added a", "synced"];
    wanted.extend(changes);
    for want in wanted {
        let line = tokio::time::timeout(PATIENCE, now.next()).await.unwrap().unwrap();
        assert_eq!(word(line), want);
    }
    // The same out of the past.
    let past = ListParams { from: Some(from), ..filter };
    let mut past = test.cloud.watch::<Vm>(&test.admin, &past).await.unwrap();
    for want in changes {
        let line = tokio::time::timeout(PATIENCE, past.next()).await.unwrap().unwrap();
        assert_eq!(word(line), want);
    }
}
