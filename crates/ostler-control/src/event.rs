//! What events are about.

use ostler_api::operation::Target;
use ostler_api::{Name, Resource};
use uuid::Uuid;

/// The resource as operations and events name it.
pub(crate) fn target<T: Resource>(object: &T) -> Target {
    let metadata = object.metadata();
    Target { kind: T::KIND, id: metadata.id, name: metadata.name.clone() }
}

/// The name of something that has none: its id.
pub(crate) fn id_name(id: Uuid) -> Result<Name, ostler_api::ApiError> {
    Name::new(&id.to_string()).map_err(ostler_api::ApiError::internal)
}
