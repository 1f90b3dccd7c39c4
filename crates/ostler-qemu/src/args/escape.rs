//! QEMU's `key=value,key=value` options.

/// Doubles commas, which is how QEMU takes one inside a value.
pub fn escape_commas(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// How QEMU splits an option string: a single comma ends a value, a double one is a comma.
    fn split_like_qemu(text: &str) -> Vec<String> {
        let (mut parts, mut part, mut chars) = (Vec::new(), String::new(), text.chars().peekable());
        while let Some(c) = chars.next() {
            match c {
                ',' if chars.peek() == Some(&',') => {
                    chars.next();
                    part.push(',');
                }
                ',' => parts.push(std::mem::take(&mut part)),
                other => part.push(other),
            }
        }
        parts.push(part);
        parts
    }

    proptest! {
        #[test]
        fn an_escaped_value_stays_one_value(value in ".*", next in "[a-z]+=[a-z]*") {
            let line = format!("guest={},{next}", escape_commas(&value));
            prop_assert_eq!(split_like_qemu(&line), vec![format!("guest={value}"), next]);
        }
    }
}
