//! Every route, as the OpenAPI document lists it, tried by those who must not get in.

use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{Site, Via};

const PUBLIC: [&str; 4] = ["/healthz", "/readyz", "/v1/version", "/v1/openapi.json"];

/// A route with the names of `default`'s things in its path.
#[derive(Debug)]
struct Route {
    method: Method,
    template: String,
    path: String,
    in_project: bool,
    body: Option<Value>,
}

fn routes() -> Vec<Route> {
    let document: Value = serde_json::from_str(&ostler_server::openapi_json()).unwrap();
    let mut found = Vec::new();
    for (template, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
            let in_project = parameters.iter().any(|p| p["in"] == "query" && p["name"] == "project");
            let path = [
                ("{vm}", "web"),
                ("{image}", "base"),
                ("{volume}", "web"),
                ("{snapshot}", "web"),
                ("{node}", "n1"),
                ("{token}", "admin"),
                ("{operation}", "00000000-0000-7000-8000-000000000000"),
                ("{sha256}", "abc"),
                ("{stream}", "00000000-0000-7000-8000-000000000000"),
            ]
            .iter()
            .fold(template.clone(), |path, (parameter, value)| path.replace(parameter, value));
            assert!(!path.contains('{'), "{template}: this test does not know the parameter");
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            let json = &operation["requestBody"]["content"]["application/json"]["schema"]["$ref"];
            let body = json.as_str().map(|schema| body(schema.rsplit('/').next().unwrap()));
            found.push(Route { method, template: template.clone(), path, in_project, body });
        }
    }
    found
}

/// A valid body, so that nothing but permission stands in the way.
fn body(schema: &str) -> Value {
    match schema {
        "VmCreate" => json!({"name": "new", "image": "base"}),
        "ImageCreate" => json!({"name": "new"}),
        "TokenCreate" => json!({"name": "new", "role": "admin"}),
        "VolumeCreate" => json!({"name": "new", "size": 1 << 20}),
        "VolumeResize" => json!({"size": 1 << 30}),
        "SnapshotCreate" => json!({"name": "new", "volume": "web-root"}),
        "VmAttach" | "VmDetach" => json!({"volume": "web-root"}),
        "VmPatch" | "ImagePatch" | "VolumePatch" | "SnapshotPatch" => json!({"labels": {"x": "y"}}),
        "NodePatch" => json!({"schedulable": false}),
        "VmRebuild" => json!({"image": "base"}),
        "Reports" => json!({"reports": []}),
        "NodeRegister" => json!({"id": uuid::Uuid::now_v7(), "facts": {
            "version": "0", "boot": "b", "cpus": 1, "memory": 1, "disk": 1, "disk_free": 1, "cpu_model": "x",
            "accelerators": []
        }}),
        "NoFields" | "VmShutdown" | "VmReboot" => json!({}),
        other => panic!("this test does not know the body {other}"),
    }
}

impl Route {
    fn ask<'a>(&self, site: &'a Site, token: Option<&str>) -> crate::support::Ask<'a> {
        let query = if self.in_project { "?project=default" } else { "" };
        let ask = site.ask(self.method.clone(), &format!("{}{query}", self.path)).via(Via::Plain);
        let ask = match token {
            None => ask,
            Some(token) => ask.token(token),
        };
        match &self.body {
            None => ask,
            Some(body) => ask.json(body),
        }
    }
}

#[tokio::test]
async fn without_a_valid_token_nothing_is_answered() {
    let site = Site::start().await;
    let revoked = site.token(json!({"name": "gone", "role": "admin"})).await;
    assert_eq!(site.ask(Method::DELETE, "/v1/tokens/gone").send().await.status, StatusCode::NO_CONTENT);
    let mut wrong_secret = site.token(json!({"name": "admin", "role": "admin"})).await;
    wrong_secret.replace_range(wrong_secret.len() - 1.., "_");

    let mut tried = 0;
    for route in routes() {
        if PUBLIC.contains(&route.template.as_str()) {
            assert_eq!(route.ask(&site, None).send().await.status, StatusCode::OK, "{route:?}");
            continue;
        }
        let mut first: Option<String> = None;
        for token in [None, Some("garbage"), Some(revoked.as_str()), Some(wrong_secret.as_str())] {
            let answer = route.ask(&site, token).send().await;
            assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{route:?} {}", answer.text());
            assert_eq!(answer.headers["www-authenticate"], "Bearer");
            let problem = answer.problem();
            // Wrong, unknown and revoked tokens look the same.
            if token.is_some() {
                let detail = first.get_or_insert_with(|| problem.detail.clone());
                assert_eq!(*detail, problem.detail);
            }
        }
        tried += 1;
    }
    assert!(tried > 40, "{tried}");
    // A method that a route does not take is no way in either.
    site.ask(Method::DELETE, "/v1/vms").via(Via::Plain).refused(401, "unauthenticated").await;
    site.stop().await;
}

#[tokio::test]
async fn strangers_get_nothing_and_learn_nothing() {
    let site = Site::start().await;
    site.node("n1").await;
    site.image("base").await;
    let answer = site.post("/v1/vms", &json!({"name": "web", "image": "base"})).send().await;
    assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.text());

    site.project("theirs").await;
    let member = site.token(json!({"name": "m", "role": "member", "project": "theirs"})).await;
    let node = site.token(json!({"name": "n2", "role": "node", "node": "n2"})).await;
    for (who, token) in [("member", &member), ("node", &node)] {
        for route in routes() {
            // Shown to every identity.
            let harmless = PUBLIC.contains(&route.template.as_str())
                || route.template == "/metrics"
                || (who == "member" && route.template == "/v1/projects");
            if harmless {
                continue;
            }
            let answer = route.ask(&site, Some(token)).send().await;
            let status = answer.status.as_u16();
            assert!([403, 404].contains(&status), "{who} {route:?}: {status} {}", answer.text());
            answer.problem();
        }
    }

    // What is there looks like what is not.
    for kind in ["vms", "images", "volumes"] {
        let there = if kind == "images" { "base" } else { "web" };
        for project in ["?project=default", "?project=*", ""] {
            let ask =
                |name: &str| site.get(&format!("/v1/{kind}/{name}{project}")).via(Via::Plain).token(&member);
            let (there_is, there_is_not) = (ask(there).send().await, ask("nothing").send().await);
            assert_eq!(there_is.status, StatusCode::NOT_FOUND);
            let strip = |problem: ostler_api::Problem, name: &str| problem.detail.replace(name, "X");
            assert_eq!(
                strip(there_is.problem(), there),
                strip(there_is_not.problem(), "nothing"),
                "{kind}{project}"
            );
        }
    }
    site.stop().await;
}
