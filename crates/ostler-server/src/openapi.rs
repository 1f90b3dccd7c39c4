//! The OpenAPI document: its frame, and what all operations share.

use std::collections::BTreeMap;

use utoipa::IntoResponses;
use utoipa::openapi::response::Response;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::tag::TagBuilder;
use utoipa::openapi::{
    ContentBuilder, InfoBuilder, LicenseBuilder, OpenApi, OpenApiBuilder, Ref, RefOr, ResponseBuilder,
};

use crate::problem::PROBLEM_JSON;

const ABOUT: &str = "\
Names or ids stand in paths. `project` picks the project: the caller's own when it is not given, `*` for all in lists.

Sizes are bytes, durations seconds, times RFC 3339 in UTC. Unknown fields are refused.

Errors are `application/problem+json` with a stable `code`, the `field` at fault and a `hint`. What a caller may not see \
looks as if it were not there.

`ETag` is the revision; `If-Match` with it makes a change conditional (412 `revision_mismatch`). A POST with an \
`Idempotency-Key` (1-128 visible ASCII characters) that is sent again is done once, and 422 `idempotency_mismatch` when it \
is another request. `X-Request-Id` is taken over or made, and stands in errors and in the server's log.";

/// The document without paths; they come from the routes.
pub(crate) fn frame() -> OpenApi {
    let info = InfoBuilder::new()
        .title("Ostler")
        .version("v1")
        .description(Some(ABOUT))
        .license(Some(LicenseBuilder::new().name("Apache-2.0").identifier(Some("Apache-2.0")).build()))
        .build();
    let tags = [
        ("vms", "Virtual machines, their actions, consoles and logs."),
        ("images", "What disks, kernels and CDs are made from."),
        ("volumes", "The disks of VMs."),
        ("nodes", "The hosts that run VMs, and what their agents say and hear."),
        ("operations", "What takes long: progress, result, cancel."),
        ("events", "What happened."),
        ("tokens", "Who may call from elsewhere."),
        ("projects", "Whose things are whose."),
        ("system", "The server itself."),
    ]
    .map(|(name, about)| TagBuilder::new().name(name).description(Some(about)).build());
    OpenApiBuilder::new().info(info).tags(Some(tags)).build()
}

/// Adds what belongs to the whole document once the paths are in it.
pub(crate) fn complete(mut document: OpenApi) -> OpenApi {
    let bearer = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("`ostler_ID_SECRET`. On the unix socket the user who runs the server needs none."))
        .build();
    document.components.get_or_insert_default().add_security_scheme("token", SecurityScheme::Http(bearer));
    document.security = Some(vec![SecurityRequirement::new("token", Vec::<String>::new())]);
    document
}

/// What every operation may answer besides its success.
pub(crate) struct Problems;

impl IntoResponses for Problems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).build();
        let response = ResponseBuilder::new()
            .description("A problem: `code` says which, `hint` what to do.")
            .content(PROBLEM_JSON, content)
            .build();
        [("default".to_owned(), response.into())].into()
    }
}
