//! Bodies that nobody wrote on purpose: whatever comes, no answer is 500.

use std::sync::OnceLock;

use http::Method;
use http::header::CONTENT_TYPE;
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::support::{Site, Via};

fn valid() -> Vec<(Method, &'static str, Value)> {
    vec![
        (
            Method::POST,
            "/v1/vms",
            json!({"name": "web", "image": "base", "cpus": 2, "memory": 1 << 28, "disk": 1 << 30,
            "labels": {"a": "b"}, "publish": [{"host_port": 2222, "guest_port": 22, "protocol": "tcp"}],
            "kernel": "k", "initrd": "i", "cmdline": "quiet", "node_selector": {"x": "y"}, "start": false}),
        ),
        (
            Method::PATCH,
            "/v1/vms/web",
            json!({"name": "other", "cpus": 3, "labels": {"a": "c"}, "publish": []}),
        ),
        (Method::POST, "/v1/vms/web/actions/shutdown", json!({"timeout": 5, "force": false})),
        (Method::POST, "/v1/vms/web/actions/rebuild", json!({"image": "base", "disk": 1 << 30})),
        (Method::POST, "/v1/images", json!({"name": "base", "labels": {}, "expected_sha256": "00"})),
        (Method::PATCH, "/v1/images/base", json!({"name": "b", "labels": {"k": "v"}})),
        (Method::POST, "/v1/tokens", json!({"name": "t", "role": "member", "project": "default", "ttl": 60})),
        (
            Method::PUT,
            "/v1/nodes/n1",
            json!({"id": "018f0000-0000-7000-8000-000000000001", "labels": {"z": "1"},
            "facts": {"version": "1", "boot": "b", "cpus": 4, "memory": 1, "disk": 1, "disk_free": 1, "cpu_model": "m",
            "accelerators": ["tcg"], "warnings": []}}),
        ),
        (
            Method::POST,
            "/v1/nodes/n1/reports",
            json!({"reports": [{"type": "volume",
            "volume": "018f0000-0000-7000-8000-000000000002", "state": {"state": "ready", "used": 5}}]}),
        ),
    ]
}

/// One change somewhere in a document.
#[derive(Debug, Clone)]
enum Mutation {
    Replace(usize, Value),
    Remove(usize),
    Add(usize, String, Value),
    /// In the text: byte at a place becomes another.
    Byte(usize, u8),
    Cut(usize),
}

fn odd() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,80}".prop_map(Value::from),
        "[a-z0-9-]{0,70}".prop_map(Value::from),
        Just(json!("x".repeat(70_000))),
        Just(json!("\u{0}")),
        Just(json!([])),
        Just(json!({})),
        Just(json!([[[[[[1]]]]]])),
        Just(json!({"a": {"b": ["c", null]}})),
    ]
}

fn mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        4 => (any::<usize>(), odd()).prop_map(|(at, value)| Mutation::Replace(at, value)),
        1 => any::<usize>().prop_map(Mutation::Remove),
        2 => (any::<usize>(), "[a-z_]{0,12}", odd()).prop_map(|(at, key, value)| Mutation::Add(at, key, value)),
        1 => (any::<usize>(), any::<u8>()).prop_map(|(at, byte)| Mutation::Byte(at, byte)),
        1 => any::<usize>().prop_map(Mutation::Cut),
    ]
}

/// All places in a document, as JSON pointers.
fn places(value: &Value, here: &str, found: &mut Vec<String>) {
    found.push(here.to_owned());
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(key, value)| places(value, &format!("{here}/{key}"), found))
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(at, value)| places(value, &format!("{here}/{at}"), found));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn mutate(mut document: Value, mutations: &[Mutation]) -> Vec<u8> {
    let mut text_changes = Vec::new();
    for mutation in mutations {
        let mut found = Vec::new();
        places(&document, "", &mut found);
        let place = |at: &usize| found[at % found.len()].clone();
        match mutation {
            Mutation::Replace(at, value) => *document.pointer_mut(&place(at)).unwrap() = value.clone(),
            Mutation::Remove(at) => {
                let path = place(at);
                if let Some((parent, key)) = path.rsplit_once('/')
                    && let Some(fields) = document.pointer_mut(parent).and_then(Value::as_object_mut)
                {
                    fields.remove(key);
                }
            }
            Mutation::Add(at, key, value) => {
                if let Some(fields) = document.pointer_mut(&place(at)).and_then(Value::as_object_mut) {
                    fields.insert(key.clone(), value.clone());
                }
            }
            Mutation::Byte(..) | Mutation::Cut(_) => text_changes.push(mutation.clone()),
        }
    }
    let mut text = serde_json::to_vec(&document).unwrap();
    for change in text_changes {
        match change {
            Mutation::Byte(at, byte) if !text.is_empty() => {
                let at = at % text.len();
                text[at] = byte;
            }
            Mutation::Cut(at) if !text.is_empty() => text.truncate(at % text.len()),
            Mutation::Byte(..)
            | Mutation::Cut(_)
            | Mutation::Replace(..)
            | Mutation::Remove(_)
            | Mutation::Add(..) => {}
        }
    }
    text
}

/// One server for all cases.
fn shared() -> &'static (Runtime, Site) {
    static SHARED: OnceLock<(Runtime, Site)> = OnceLock::new();
    SHARED.get_or_init(|| {
        let runtime = Runtime::new().unwrap();
        let site = runtime.block_on(async {
            let site = Site::start().await;
            site.node("n1").await;
            site.image("base").await;
            site.post("/v1/vms", &json!({"name": "web", "image": "base", "start": false})).send().await;
            site
        });
        (runtime, site)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn no_body_is_an_internal_error(which in any::<usize>(), mutations in prop::collection::vec(mutation(), 1..4)) {
        let (runtime, site) = shared();
        let mut all = valid();
        let which = which % all.len();
        let (method, path, document) = all.swap_remove(which);
        let body = mutate(document, &mutations);
        let text = String::from_utf8_lossy(&body).into_owned();
        let answer = runtime.block_on(
            site.ask(method.clone(), path).header(CONTENT_TYPE, "application/json").body(body).send());
        prop_assert!(answer.status.as_u16() < 500, "{method} {path} {text}\n{}", answer.text());
        if answer.status.is_client_error() {
            answer.problem();
        }
    }

    #[test]
    fn no_query_or_path_is_an_internal_error(
        path in "/v1/(vms|images|nodes|operations)(/[ -~]{0,20}){0,2}", query in "[ -~]{0,40}"
    ) {
        let (runtime, site) = shared();
        let target: String = format!("{path}?{query}").chars().filter(|c| !" \"<>\\^`{|}#".contains(*c)).collect();
        if target.parse::<http::Uri>().is_ok() && !target.contains("watch=true") && !target.contains("wait=") {
            let answer = runtime.block_on(site.get(&target).via(Via::Unix).send());
            prop_assert!(answer.status.as_u16() < 500, "{target}\n{}", answer.text());
        }
    }
}
