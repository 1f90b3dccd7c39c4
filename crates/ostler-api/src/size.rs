//! Sizes in bytes, and how people write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A number of bytes. In JSON an integer; on a command line also `512M`, `20G`, `1.5TiB`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, ToSchema,
)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a size: write a number and a unit, such as 512M, 20G or 1.5T (powers of 1024)")]
pub struct SizeError {
    text: String,
}

const UNITS: [(&str, u64); 5] = [("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10), ("B", 1)];

impl ByteSize {
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = SizeError;

    /// Units are powers of 1024: `K`, `M`, `G`, `T`, each also with `B` or `iB` behind it. A bare number is bytes.
    fn from_str(text: &str) -> Result<Self, SizeError> {
        let fail = || SizeError { text: text.to_owned() };
        let upper = text.trim().to_ascii_uppercase();
        let digits = upper.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(upper.len());
        let (number, unit) = upper.split_at(digits);
        let unit = unit.trim();
        let unit = unit.strip_suffix("IB").or(unit.strip_suffix('B')).unwrap_or(unit);
        let factor = match unit {
            "" => 1,
            unit => UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(fail)?.1,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.len() > 6 || number.ends_with('.') {
            return Err(fail());
        }
        let whole: u64 = whole.parse().map_err(|_| fail())?;
        let mut total = u128::from(whole) * u128::from(factor);
        if !fraction.is_empty() {
            let part: u128 = fraction.parse().map_err(|_| fail())?;
            total +=
                part * u128::from(factor) / 10u128.pow(u32::try_from(fraction.len()).map_err(|_| fail())?);
        }
        u64::try_from(total).map(Self).map_err(|_| fail())
    }
}

impl fmt::Display for ByteSize {
    /// `512 MiB`, `1.5 GiB`: one decimal at most.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match UNITS.iter().find(|(_, factor)| self.0 >= *factor && *factor > 1) {
            None => format!("{} B", self.0),
            Some((unit, factor)) => {
                let tenths = (u128::from(self.0) * 10 + u128::from(*factor) / 2) / u128::from(*factor);
                match (tenths / 10, tenths % 10) {
                    (whole, 0) => format!("{whole} {unit}iB"),
                    (whole, tenth) => format!("{whole}.{tenth} {unit}iB"),
                }
            }
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("1k", 1024),
            ("256M", 256 << 20),
            ("256 MiB", 256 << 20),
            ("20GB", 20 << 30),
            ("1.5G", 3 << 29),
            ("2TiB", 2 << 40),
        ] {
            assert_eq!(text.parse::<ByteSize>().map(|s| s.0), Ok(bytes), "{text}");
        }
        for bad in ["", "G", "-1G", "1X", "1.G", ".5G", "1e9", "99999999999T", "1.2.3M"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
    }

    #[test]
    fn prints_in_binary_units() {
        assert_eq!(ByteSize(0).to_string(), "0 B");
        assert_eq!(ByteSize(1023).to_string(), "1023 B");
        assert_eq!(ByteSize::mib(256).to_string(), "256 MiB");
        assert_eq!(ByteSize(3 << 29).to_string(), "1.5 GiB");
    }
}
