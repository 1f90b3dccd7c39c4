//! What all resources have in common over HTTP: revisions, idempotency, waiting, paging, errors.

use http::header::IF_MATCH;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{Site, Via};

async fn vm(site: &Site, name: &str) -> Value {
    let answer =
        site.post("/v1/vms", &json!({"name": name, "image": "base", "memory": 64 << 20})).send().await;
    assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.text());
    answer.json()
}

#[tokio::test]
async fn a_change_is_for_the_revision_that_was_read() {
    let site = Site::start().await;
    site.image("base").await;
    let shown = site.get("/v1/images/base").send().await;
    let etag = shown.etag();
    assert_eq!(etag, format!("\"{}\"", shown.json()["metadata"]["revision"]));
    let patch = |labels: Value| site.ask(Method::PATCH, "/v1/images/base").json(&json!({"labels": labels}));

    let changed = patch(json!({"a": "1"})).header(IF_MATCH, &etag).send().await;
    assert_eq!(changed.status, StatusCode::OK, "{}", changed.text());
    assert_ne!(changed.etag(), etag);
    patch(json!({"a": "2"})).header(IF_MATCH, &etag).refused(412, "revision_mismatch").await;
    site.ask(Method::DELETE, "/v1/images/base")
        .header(IF_MATCH, &etag)
        .refused(412, "revision_mismatch")
        .await;
    patch(json!({})).header(IF_MATCH, "yesterday").refused(400, "invalid").await;
    assert_eq!(site.get("/v1/images/base").send().await.json()["metadata"]["labels"]["a"], "1");
    assert_eq!(patch(json!({"a": "3"})).header(IF_MATCH, "*").send().await.status, StatusCode::OK);
    assert_eq!(patch(json!({"a": "4"})).send().await.status, StatusCode::OK);
    site.stop().await;
}

#[tokio::test]
async fn the_same_key_is_the_same_request() {
    let site = Site::start().await;
    site.image("base").await;
    let create = |cpus: u32| site.post("/v1/vms", &json!({"name": "web", "image": "base", "cpus": cpus}));
    let first = create(1).key("k1").send().await;
    assert_eq!(first.status, StatusCode::CREATED, "{}", first.text());
    let again = create(1).key("k1").send().await;
    assert_eq!(again.status, StatusCode::CREATED, "{}", again.text());
    assert_eq!(first.json()["resource"]["metadata"]["id"], again.json()["resource"]["metadata"]["id"]);
    assert_eq!(first.json()["operation"]["metadata"]["id"], again.json()["operation"]["metadata"]["id"]);
    create(2).key("k1").refused(422, "idempotency_mismatch").await;
    create(1).key("k2").refused(409, "already_exists").await;
    create(1).key("not visible").refused(400, "invalid").await;
    assert_eq!(site.get("/v1/vms").send().await.json()["items"].as_array().unwrap().len(), 1);
    site.stop().await;
}

#[tokio::test]
async fn waiting_ends_with_the_phase_or_the_time() {
    let site = Site::start().await;
    site.image("base").await;
    // There is no node, so it stays pending.
    let body = json!({"name": "web", "image": "base"});
    let problem = site.post("/v1/vms?wait=running&timeout=1", &body).refused(408, "timed_out").await;
    assert!(problem.hint.unwrap().contains("goes on"));
    let shown = site.get("/v1/vms/web?wait=pending,running&timeout=60").send().await;
    assert_eq!(shown.json()["status"]["phase"], "pending", "{}", shown.text());
    for (query, field) in [
        ("wait=runing", "wait"),
        ("timeout=5", "timeout"),
        ("wait=running&timeout=9999", "timeout"),
        ("weit=x", "weit"),
    ] {
        let problem = site.get(&format!("/v1/vms/web?{query}")).refused(400, "invalid").await;
        assert_eq!(problem.field.as_deref(), Some(field), "{problem:?}");
    }
    // A wait that cannot be is refused before anything is done.
    site.post("/v1/vms?wait=nonsense", &json!({"name": "other", "image": "base"}))
        .refused(400, "invalid")
        .await;
    site.get("/v1/vms/other").refused(404, "not_found").await;

    let waiting = site.get("/v1/vms/web?wait=gone&timeout=60");
    let deleting = site.ask(Method::DELETE, "/v1/vms/web?wait=gone&timeout=60");
    let (waited, deleted) = tokio::join!(waiting.send(), deleting.send());
    assert_eq!(deleted.status, StatusCode::ACCEPTED, "{}", deleted.text());
    assert_eq!(deleted.json()["resource"]["metadata"]["name"], "web");
    assert!([StatusCode::NO_CONTENT, StatusCode::NOT_FOUND].contains(&waited.status), "{}", waited.text());
    site.get("/v1/vms/web").refused(404, "not_found").await;
    site.stop().await;
}

#[tokio::test]
async fn lists_filter_and_page() {
    let site = Site::start().await;
    site.image("base").await;
    for name in ["a", "b", "c"] {
        vm(&site, name).await;
    }
    let names = |answer: &Value| -> Vec<String> {
        let items = answer["items"].as_array().unwrap();
        items.iter().map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    let page = site.get("/v1/vms?limit=2").send().await.json();
    assert_eq!(names(&page), ["a", "b"]);
    let next = page["next"].as_str().unwrap();
    let rest = site.get(&format!("/v1/vms?limit=2&after={next}")).send().await.json();
    assert_eq!((names(&rest), rest.get("next")), (vec!["c".to_owned()], None));
    assert_eq!(names(&site.get("/v1/vms?name=b").send().await.json()), ["b"]);
    assert!(names(&site.get("/v1/vms?phase=running").send().await.json()).is_empty());
    for (query, field) in
        [("limit=0", "limit"), ("limit=x", "limit"), ("label=%3Dx", "label"), ("color=red", "color")]
    {
        let problem = site.get(&format!("/v1/vms?{query}")).refused(400, "invalid").await;
        assert_eq!(problem.field.as_deref(), Some(field), "{problem:?}");
    }
    site.stop().await;
}

#[tokio::test]
async fn actions_answer_with_an_operation_or_a_reason() {
    let site = Site::start().await;
    site.image("base").await;
    vm(&site, "web").await;
    let act = |action: &str, body: Value| site.post(&format!("/v1/vms/web/actions/{action}"), &body);
    let problem = act("pause", json!({})).refused(409, "conflict").await;
    assert!(problem.hint.is_some());
    act("shutdown", json!({"timeout": 5000})).refused(400, "invalid").await;
    act("shutdown", json!({"tiemout": 5})).refused(400, "invalid").await;
    act("rebuild", json!({})).refused(400, "invalid").await;
    act("explode", json!({})).refused(404, "not_found").await;
    // No body at all is as good as an empty object.
    let stopped = site.ask(Method::POST, "/v1/vms/web/actions/stop").send().await;
    assert_eq!(stopped.status, StatusCode::ACCEPTED, "{}", stopped.text());
    assert!(stopped.json()["resource"]["metadata"]["id"].is_string());
    let operations = site.get("/v1/operations").send().await.json();
    let id = operations["items"][0]["metadata"]["id"].as_str().unwrap().to_owned();
    assert_eq!(site.get(&format!("/v1/operations/{id}")).send().await.status, StatusCode::OK);
    site.stop().await;
}

#[tokio::test]
async fn all_errors_are_problems() {
    let site = Site::start().await;
    let cases = [
        (site.get("/"), 404, "not_found"),
        (site.get("/v1/nothing"), 404, "not_found"),
        (site.get("/v1/vms/none"), 404, "not_found"),
        (site.get("/v1/vms/%ff"), 400, "invalid"),
        (site.ask(Method::PUT, "/v1/vms"), 405, "invalid"),
        (site.ask(Method::POST, "/healthz"), 405, "invalid"),
        (site.ask(Method::POST, "/v1/vms").body("{}"), 415, "invalid"),
        (site.post("/v1/vms", &json!([])), 400, "invalid"),
        (site.post("/v1/vms", &json!({"name": "Not A Name"})), 400, "invalid"),
        (site.post("/v1/vms", &json!({"name": "a"})), 400, "invalid"),
        (site.get("/v1/vms/none/console"), 404, "not_found"),
    ];
    for (ask, status, code) in cases {
        ask.refused(status, code).await;
    }
    let problem = site.post("/v1/vms", &json!({"name": "a", "colour": 1})).refused(400, "invalid").await;
    assert_eq!(problem.field.as_deref(), Some("colour"));
    let id = http::HeaderName::from_static("x-request-id");
    let problem = site.get("/v1/nothing").header(id, "my-id").refused(404, "not_found").await;
    assert_eq!(problem.request_id.as_deref(), Some("my-id"));
    site.stop().await;
}

#[tokio::test]
async fn the_server_says_what_it_is() {
    let site = Site::start().await;
    for via in [Via::Unix, Via::Plain, Via::Tls, Via::Tls2] {
        assert_eq!(site.get("/healthz").via(via).send().await.text(), "ok\n");
        assert_eq!(site.get("/readyz").via(via).send().await.text(), "ok\n");
        let version = site.get("/v1/version").via(via).send().await.json();
        assert_eq!(version["cloud"], site.cloud.cloud_id().to_string());
        assert_eq!(version["schema"], ostler_api::SCHEMA_VERSION);
    }
    let document = site.get("/v1/openapi.json").via(Via::Plain).send().await;
    assert_eq!(document.text(), ostler_server::openapi_json());
    let metrics = site.get("/metrics").send().await.text();
    for line in [
        "ostler_http_requests_total{route=\"/healthz\",method=\"GET\",status=\"200\"} 4",
        "ostler_http_requests_total{route=\"/v1/openapi.json\",method=\"GET\",status=\"200\"} 1",
        "ostler_connections{listener=\"unix\"}",
        "ostler_uptime_seconds",
        "process_resident_memory_bytes",
        "process_open_fds",
        "ostler_store_revision",
    ] {
        assert!(metrics.lines().any(|l| l.starts_with(line)), "{line}\n{metrics}");
    }
    site.stop().await;
}
