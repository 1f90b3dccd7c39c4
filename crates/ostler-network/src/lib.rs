//! ostler-network
