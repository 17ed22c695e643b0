//! Which place of the source each byte came from, for the bytes that are not stored yet.

use std::collections::VecDeque;

use bytes::{Buf as _, Bytes};
use kiln_domain::engine::{Cursor, Engine};

/// Raw bytes that were read and not passed on yet, with their cursors.
#[derive(Debug)]
pub(crate) struct Held {
    pieces: VecDeque<(Cursor, Bytes)>,
    /// Of the byte after the last one that was passed on.
    next: Cursor,
}

impl Held {
    pub(crate) fn at(cursor: Cursor) -> Self {
        Self { pieces: VecDeque::new(), next: cursor }
    }

    /// What was read from `from` on.
    pub(crate) fn push(&mut self, from: Cursor, bytes: Bytes) {
        if self.pieces.is_empty() {
            self.next = from.clone();
        }
        self.pieces.push_back((from, bytes));
    }

    /// Passes on the first `count` bytes; the cursor of the byte after them.
    pub(crate) fn take(&mut self, engine: &dyn Engine, mut count: usize) -> Cursor {
        while count > 0
            && let Some((from, mut bytes)) = self.pieces.pop_front()
        {
            let part = count.min(bytes.len());
            self.next = engine.advance(&from, bytes.get(..part).unwrap_or_default());
            count -= part;
            bytes.advance(part);
            if !bytes.is_empty() {
                self.pieces.push_front((self.next.clone(), bytes));
            } else if let Some((following, _)) = self.pieces.front() {
                self.next = following.clone();
            }
        }
        self.next.clone()
    }

    pub(crate) fn next(&self) -> &Cursor {
        &self.next
    }
}

#[cfg(test)]
mod tests {
    use kiln_testkit::engine::FakeEngine;

    use super::*;

    #[test]
    fn a_cursor_for_each_byte() {
        let engine = FakeEngine::default();
        let mut held = Held::at(Cursor::default());
        assert_eq!(held.next(), &Cursor::default());
        held.push(Cursor::new("0"), "abc".into());
        held.push(Cursor::new("3"), "de".into());
        // An engine whose output has a gap.
        held.push(Cursor::new("100"), "f".into());
        for (count, expected) in [(0, "0"), (1, "1"), (3, "4"), (1, "100"), (1, "101")] {
            assert_eq!(held.take(&engine, count).as_str(), expected);
            assert_eq!(held.next().as_str(), expected);
        }
    }
}
