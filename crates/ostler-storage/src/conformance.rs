//! The suite that every pool passes.
