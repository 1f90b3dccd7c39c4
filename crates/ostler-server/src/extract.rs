//! Extractors: the parts of a request, decoded strictly, with errors that name the field.

mod body;
mod headers;
mod query;

pub(crate) use body::{Act, Json, Submit};
pub(crate) use headers::{IfMatch, etag};
pub(crate) use query::Params;
