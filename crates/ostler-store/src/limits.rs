//! What a transaction may hold: the limits of etcd with its default settings, so that what works on one host works on many.

use std::collections::HashSet;

use crate::{Op, Result, StoreError, Txn};

/// Of one value.
pub const MAX_VALUE_BYTES: usize = 3 * 512 * 1024;
/// Of all keys and values of one transaction together.
pub const MAX_REQUEST_BYTES: usize = 3 * 512 * 1024;
/// Of operations, and of compares, of one transaction.
pub const MAX_TXN_OPS: usize = 128;
pub const MAX_KEY_BYTES: usize = 4096;

/// Checks what needs no look at the state. Callers do this before the transaction takes a place in a queue.
pub(crate) fn check_txn(txn: &Txn) -> Result<()> {
    at_most("the number of operations of the transaction", txn.ops.len(), MAX_TXN_OPS)?;
    at_most("the number of compares of the transaction", txn.compares.len(), MAX_TXN_OPS)?;
    let mut total = 0;
    for compare in &txn.compares {
        check_key(compare.key())?;
        total += compare.key().len();
    }
    for op in &txn.ops {
        check_key(op.key())?;
        total += op.key().len();
        match op {
            Op::Put { key, value, .. } => {
                if value.len() > MAX_VALUE_BYTES {
                    at_most(&format!("the value of {key} (in bytes)"), value.len(), MAX_VALUE_BYTES)?;
                }
                total += value.len();
            }
            Op::Delete { .. } => {}
        }
    }
    at_most("the transaction (in bytes)", total, MAX_REQUEST_BYTES)?;
    match duplicate(&txn.ops) {
        Some(key) => Err(StoreError::invalid(format!("the transaction has two operations on {key}"))),
        None => Ok(()),
    }
}

fn check_key(key: &str) -> Result<()> {
    if key.is_empty() {
        return Err(StoreError::invalid("a key is empty"));
    }
    at_most("a key (in bytes)", key.len(), MAX_KEY_BYTES)
}

fn at_most(what: &str, size: usize, limit: usize) -> Result<()> {
    if size > limit {
        return Err(StoreError::TooLarge { what: what.to_owned(), size, limit });
    }
    Ok(())
}

fn duplicate(ops: &[Op]) -> Option<&str> {
    // Nearly every transaction has a handful of operations; a set costs more than comparing these.
    if ops.len() <= 8 {
        return ops
            .iter()
            .enumerate()
            .find(|(i, op)| ops[..*i].iter().any(|earlier| earlier.key() == op.key()))
            .map(|(_, op)| op.key());
    }
    let mut seen = HashSet::with_capacity(ops.len());
    ops.iter().map(Op::key).find(|key| !seen.insert(*key))
}

/// The first string after all those that begin with `prefix`, or `None` when there is none after them.
pub(crate) fn prefix_end(prefix: &str) -> Option<String> {
    let mut end = prefix.to_owned();
    while let Some(last) = end.pop() {
        // The order of UTF-8 bytes is the order of code points, so the next code point is the next string.
        let next = match last {
            '\u{d7ff}' => Some('\u{e000}'),
            last => char::from_u32(u32::from(last) + 1),
        };
        if let Some(next) = next {
            end.push(next);
            return Some(end);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_ends() {
        assert_eq!(prefix_end("/vms/"), Some("/vms0".to_owned()));
        assert_eq!(prefix_end(""), None);
        assert_eq!(prefix_end("a\u{10ffff}"), Some("b".to_owned()));
        assert_eq!(prefix_end("\u{10ffff}"), None);
        assert_eq!(prefix_end("\u{d7ff}"), Some("\u{e000}".to_owned()));
    }

    #[test]
    fn limits_are_inclusive() {
        let key = "k";
        let fits = Txn::new().put(key, vec![0; MAX_REQUEST_BYTES - key.len()]);
        assert!(check_txn(&fits).is_ok());
        let over = Txn::new().put(key, vec![0; MAX_REQUEST_BYTES]);
        assert!(
            matches!(check_txn(&over), Err(StoreError::TooLarge { size, .. }) if size == MAX_REQUEST_BYTES + 1)
        );
    }

    #[test]
    fn duplicates_are_found_in_short_and_long_transactions() {
        for count in [2, 100] {
            let mut txn = Txn::new();
            for i in 0..count {
                txn = txn.put(format!("k{i}"), "");
            }
            assert!(check_txn(&txn).is_ok());
            assert!(matches!(check_txn(&txn.delete("k1")), Err(StoreError::Invalid { .. })));
        }
    }
}
