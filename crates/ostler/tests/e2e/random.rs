//! Random numbers that can be had again: the seed is printed, and `OSTLER_TEST_SEED` sets it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new() -> Self {
        let given = std::env::var("OSTLER_TEST_SEED").ok().and_then(|text| text.parse().ok());
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_micros() as u64);
        let seed = given.unwrap_or_else(now);
        println!("random numbers from OSTLER_TEST_SEED={seed}");
        Self(seed)
    }

    /// The next number (splitmix64).
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A moment between now and `limit`, most of them soon: that is when the steps of an action follow closely.
    pub(crate) fn moment(&mut self, limit: Duration) -> Duration {
        let part = (self.next() % 1000) as f64 / 1000.0;
        limit.mul_f64(part * part)
    }
}
