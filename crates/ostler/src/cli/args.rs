//! Values on the command line: durations, labels, words, and the arguments that many commands share.

use std::time::Duration;

use clap::Args;
use ostler_api::metadata::Labels;

/// How a command that changes something ends.
#[derive(Debug, Clone, Args)]
pub(crate) struct WaitArgs {
    /// Wait until it is done
    #[arg(short, long)]
    pub(crate) wait: bool,

    /// Longest time to wait, such as 30, 90s or 5m; past it the exit code is 5 and the work goes on
    #[arg(long, value_parser = duration, default_value = "10m", value_name = "TIME")]
    pub(crate) timeout: Duration,
}

/// A number of seconds, or a number with `s`, `m`, `h` or `d`; several of them add up: `1h30m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let fail =
        || format!("{text:?} is not a time: write seconds, or a number with s, m, h or d, such as 90s or 5m");
    let mut rest = text;
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let number: u64 = rest[..digits].parse().map_err(|_| fail())?;
        rest = &rest[digits..];
        let factor = match rest.chars().next() {
            // Only a number that stands alone may be bare.
            None if digits == text.len() => 1,
            Some('s') => 1,
            Some('m') => 60,
            Some('h') => 3600,
            Some('d') => 86_400,
            None | Some(_) => return Err(fail()),
        };
        rest = rest.get(1..).unwrap_or_default();
        total = number.checked_mul(factor).and_then(|part| total.checked_add(part)).ok_or_else(fail)?;
    }
    // Deadlines are points in time that the clock must be able to hold.
    if text.is_empty() || total > 10 * 365 * 86_400 { Err(fail()) } else { Ok(Duration::from_secs(total)) }
}

/// The same in whole seconds, as requests have it.
pub(crate) fn seconds(text: &str) -> Result<u32, String> {
    u32::try_from(duration(text)?.as_secs()).map_err(|_| format!("{text:?} is too long"))
}

/// `KEY=VALUE`.
pub(crate) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not KEY=VALUE")),
    }
}

pub(crate) fn labels(pairs: Vec<(String, String)>) -> Labels {
    pairs.into_iter().collect()
}

/// A parser for one of our word enums, which knows all its words for help and completion.
macro_rules! words {
    ($type:ty) => {{
        use clap::builder::TypedValueParser as _;
        clap::builder::PossibleValuesParser::new(<$type>::ALL.iter().map(|word| word.as_str()))
            .try_map(|word| word.parse::<$type>())
    }};
}
pub(crate) use words;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_people_write_them() {
        for (text, seconds) in
            [("30", 30), ("0", 0), ("90s", 90), ("5m", 300), ("2h", 7200), ("1h30m", 5400), ("7d", 604_800)]
        {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for bad in ["", "m", "5x", "1m30", "-5", "5 m", "1.5h", "99999999999999999999", "9999999d", "5µ"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn labels_are_pairs() {
        assert_eq!(pair("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert!(pair("a").is_err() && pair("=b").is_err());
    }
}
