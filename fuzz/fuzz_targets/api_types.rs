//! Everything that comes from outside as JSON or as a word on a command line: whatever is accepted comes out as it went in.

#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use ostler_api::image::{ImageCreate, ImagePatch};
use ostler_api::list::{LabelSelector, ListParams};
use ostler_api::node::NodeRegister;
use ostler_api::token::TokenCreate;
use ostler_api::vm::{Publish, VmCreate, VmPatch};
use ostler_api::work::{Reports, WorkLine};
use ostler_api::{ByteSize, Name, Problem};
use serde::Serialize;
use serde::de::DeserializeOwned;

fn accepts<T: DeserializeOwned + Serialize + PartialEq + Debug>(bytes: &[u8]) {
    if let Ok(value) = serde_json::from_slice::<T>(bytes) {
        let text = serde_json::to_vec(&value).expect("what was read can be written");
        assert_eq!(serde_json::from_slice::<T>(&text).expect("and read again"), value);
    }
}

fuzz_target!(|bytes: &[u8]| {
    accepts::<VmCreate>(bytes);
    accepts::<VmPatch>(bytes);
    accepts::<ImageCreate>(bytes);
    accepts::<ImagePatch>(bytes);
    accepts::<TokenCreate>(bytes);
    accepts::<NodeRegister>(bytes);
    accepts::<ListParams>(bytes);
    accepts::<WorkLine>(bytes);
    accepts::<Reports>(bytes);
    accepts::<Problem>(bytes);
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = (text.parse::<ByteSize>(), text.parse::<LabelSelector>());
    if let Ok(name) = Name::new(text) {
        assert_eq!(name.as_str(), text);
    }
    if let Ok(publish) = text.parse::<Publish>() {
        assert_eq!(publish.to_string().parse(), Ok(publish));
    }
});
