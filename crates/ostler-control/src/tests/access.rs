//! Tokens and what they open.

use std::time::Duration;

use ostler_api::ErrorCode;
use ostler_api::list::ListParams;
use ostler_api::token::{Role, Token, TokenCreate};
use ostler_api::vm::Vm;

use crate::caller::Caller;
use crate::testing::{TestCloud, name};

fn request(token: &str, role: Role) -> TokenCreate {
    TokenCreate { name: name(token), role, project: None, node: None, ttl: None }
}

async fn caller(test: &TestCloud, request: TokenCreate) -> (Caller, String) {
    let made = test.cloud.token_create(&test.admin, request).await.unwrap();
    (test.cloud.caller_bearer(&made.secret).await.unwrap(), made.secret)
}

#[tokio::test]
async fn a_token_opens_until_it_is_revoked_and_its_secret_is_stored_nowhere() {
    let test = TestCloud::new().await;
    let (_, secret) = caller(&test, request("t", Role::Admin)).await;
    let bare = secret.rsplit('_').next().unwrap();
    let page = test.cloud.store.list(ostler_store::ListQuery::prefix("")).await.unwrap();
    for kv in &page.items {
        assert!(!String::from_utf8_lossy(&kv.value).contains(bare), "{} holds the secret", kv.key);
    }
    let shown = test.cloud.list::<Token>(&test.admin, &ListParams::default()).unwrap();
    assert!(!serde_json::to_string(&shown).unwrap().contains("hash"));
    test.cloud.token_delete(&test.admin, "t").await.unwrap();
    let error = test.cloud.caller_bearer(&secret).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unauthenticated);
}

#[tokio::test]
async fn a_token_expires() {
    let test = TestCloud::new().await;
    let made = test
        .cloud
        .token_create(&test.admin, TokenCreate { ttl: Some(1), ..request("t", Role::Admin) })
        .await
        .unwrap();
    let refused = async {
        while test.cloud.caller_bearer(&made.secret).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), refused).await.unwrap();
}

#[tokio::test]
async fn garbage_opens_nothing() {
    let test = TestCloud::new().await;
    let (_, secret) = caller(&test, request("t", Role::Admin)).await;
    let (head, _) = secret.rsplit_once('_').unwrap();
    for bad in [
        "",
        "x",
        "ostler_",
        "ostler__",
        head,
        &format!("{head}_"),
        &format!("{head}_{}", "0".repeat(64)),
        &secret[1..],
    ] {
        assert!(test.cloud.caller_bearer(bad).await.is_err(), "{bad}");
    }
}

#[tokio::test]
async fn a_member_of_another_project_sees_nothing() {
    let test = TestCloud::new().await;
    test.image("img").await;
    test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    let id = test.vm("a").metadata.id.to_string();
    // The project does not exist yet: nobody can be its member.
    let request = TokenCreate { project: Some(name("other")), ..request("m", Role::Member) };
    assert_eq!(
        test.cloud.token_create(&test.admin, request.clone()).await.unwrap_err().code,
        ErrorCode::NotFound
    );
    let member = Caller::new(crate::permission::Identity::Token {
        id: ostler_api::TokenId::new(),
        role: Role::Member,
        project: request.project,
        node: None,
    });
    for project in [None, Some("default"), Some("*"), Some("other")] {
        for vm in ["a", id.as_str()] {
            let missing = test.cloud.get::<Vm>(&member, project, vm).unwrap_err();
            assert_eq!(missing.code, ErrorCode::NotFound, "{project:?} {vm}");
            let delete = test.cloud.vm_delete(&member, project, vm, None, true).await.unwrap_err();
            assert_eq!(delete.code, ErrorCode::NotFound, "{project:?} {vm}");
        }
    }
    let tokens = test.cloud.list::<Token>(&member, &ListParams::default()).unwrap_err();
    assert_eq!(tokens.code, ErrorCode::Forbidden);
}

#[tokio::test]
async fn a_reader_reads() {
    let test = TestCloud::new().await;
    test.image("img").await;
    test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    let (reader, _) =
        caller(&test, TokenCreate { project: Some(name("default")), ..request("r", Role::Reader) }).await;
    test.cloud.get::<Vm>(&reader, None, "a").unwrap();
    let error = test.cloud.vm_delete(&reader, None, "a", None, false).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Forbidden);
    let all = ListParams { project: Some("*".into()), ..ListParams::default() };
    assert_eq!(test.cloud.list::<Vm>(&reader, &all).unwrap().items.len(), 1);
}
