//! Times as people read them.

use std::time::Duration;

use ostler_api::Time;

/// `42s`, `7m`, `3h`, `12d`: one unit, rounded down.
pub(crate) fn age(since: Time, now: Time) -> String {
    let seconds = now.since(since).as_secs();
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// `2026-11-20T08:00:00Z`.
pub(crate) fn moment(time: Time) -> String {
    time.0.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `2026-11-20T08:00:00Z (3h ago)`.
pub(crate) fn moment_and_age(time: Time, now: Time) -> String {
    format!("{} ({} ago)", moment(time), age(time, now))
}

/// `0.4 s`, `12 s`, `3 min 20 s`.
pub(crate) fn span(span: Duration) -> String {
    match span.as_secs() {
        0..=9 => format!("{:.1} s", span.as_secs_f64()),
        seconds @ 10..=119 => format!("{seconds} s"),
        seconds => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_have_one_unit() {
        let start: Time = serde_json::from_str("\"2026-01-01T00:00:00Z\"").unwrap();
        for (seconds, text) in
            [(0, "0s"), (119, "119s"), (120, "2m"), (7199, "119m"), (7200, "2h"), (172_800, "2d")]
        {
            assert_eq!(age(start, start.after(Duration::from_secs(seconds))), text);
        }
        assert_eq!(age(start.after(Duration::from_secs(9)), start), "0s");
        assert_eq!(moment(start), "2026-01-01T00:00:00Z");
        assert_eq!(span(Duration::from_millis(1250)), "1.2 s");
        assert_eq!(span(Duration::from_secs(200)), "3 min 20 s");
    }
}
