//! Masks secrets in a byte stream that comes in pieces of any size.
//!
//! The result depends on the stream alone, not on how it is cut; and masking begun anew at any place where a [`Piece`]
//! ends, or within a plain one, gives what masking the whole gives from there on. That is what lets another relay go
//! on where this one ended.

mod forms;

use std::sync::Arc;

use aho_corasick::AhoCorasick;
use bytes::Bytes;

use self::forms::forms;

/// What stands for a secret. Shorter than any secret that is masked, so that masking never makes an output longer.
pub const MASK: &[u8] = b"***";

/// Overlapping matches are masked as one, up to this many bytes: a secret of one repeated letter in an output of the
/// same letter must not be held back for ever.
const LONGEST_RUN: usize = 64 * 1024;

/// Everything that is to be masked in one build's output.
#[derive(Debug)]
pub struct Patterns {
    /// `None` where there is nothing to mask.
    automaton: Option<AhoCorasick>,
    needles: Vec<Needle>,
    longest_run: usize,
}

/// A pattern and how far a mismatch falls back in it (Knuth, Morris, Pratt).
#[derive(Debug)]
struct Needle {
    bytes: Vec<u8>,
    borders: Vec<usize>,
}

/// A part of the masked output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// The raw bytes as they are. It may be cut anywhere.
    Plain(Bytes),
    /// [`MASK`] in place of so many raw bytes.
    Masked { raw: usize },
}

/// One stream's masking.
#[derive(Debug)]
pub struct Masker {
    patterns: Arc<Patterns>,
    /// Raw bytes that may be the beginning of a secret.
    held: Vec<u8>,
}

/// The secrets are too many or too large to be looked for.
#[derive(Debug, thiserror::Error)]
#[error("the secrets can't be looked for: {0}")]
pub struct TooLarge(String);

impl Patterns {
    /// All [`forms`] of some secrets.
    pub fn of<'a>(secrets: impl IntoIterator<Item = &'a [u8]>) -> Result<Self, TooLarge> {
        let all: std::collections::BTreeSet<_> = secrets.into_iter().flat_map(forms).collect();
        Self::exactly(all.into_iter().collect(), LONGEST_RUN)
    }

    fn exactly(patterns: Vec<Vec<u8>>, longest_run: usize) -> Result<Self, TooLarge> {
        let automaton = match patterns.is_empty() {
            true => None,
            false => Some(AhoCorasick::new(&patterns).map_err(|error| TooLarge(error.to_string()))?),
        };
        Ok(Self { automaton, needles: patterns.into_iter().map(Needle::new).collect(), longest_run })
    }

    /// A whole text, masked.
    pub fn masked(self: &Arc<Self>, text: &str) -> String {
        let mut masker = Masker::new(self.clone());
        let mut pieces = masker.push(&Bytes::copy_from_slice(text.as_bytes()));
        pieces.extend(masker.finish());
        let bytes: Vec<u8> = pieces.iter().flat_map(Piece::shown).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// How many of the last bytes may be the beginning of a secret.
    fn pending(&self, bytes: &[u8]) -> usize {
        self.needles.iter().map(|needle| needle.pending(bytes)).max().unwrap_or(0)
    }

    /// Every occurrence, overlapping ones too, by where it begins.
    fn matches(&self, bytes: &[u8]) -> Vec<(usize, usize)> {
        let Some(automaton) = &self.automaton else { return Vec::new() };
        let mut matches: Vec<_> =
            automaton.find_overlapping_iter(bytes).map(|found| (found.start(), found.end())).collect();
        matches.sort_unstable();
        matches
    }
}

impl Needle {
    fn new(bytes: Vec<u8>) -> Self {
        let mut borders: Vec<usize> = Vec::with_capacity(bytes.len());
        let mut matched = 0;
        for (at, byte) in bytes.iter().enumerate() {
            if at > 0 {
                matched = step(&bytes, &borders, matched, *byte);
            }
            borders.push(matched);
        }
        Self { bytes, borders }
    }

    /// The length of the longest end of `text` that this begins with, without being all of it.
    fn pending(&self, text: &[u8]) -> usize {
        let tail =
            text.get(text.len().saturating_sub(self.bytes.len().saturating_sub(1))..).unwrap_or_default();
        tail.iter().fold(0, |matched, byte| step(&self.bytes, &self.borders, matched, *byte))
    }
}

fn step(bytes: &[u8], borders: &[usize], mut matched: usize, byte: u8) -> usize {
    while matched > 0 && bytes.get(matched) != Some(&byte) {
        matched = borders.get(matched - 1).copied().unwrap_or(0);
    }
    if bytes.get(matched) == Some(&byte) { matched + 1 } else { 0 }
}

impl Piece {
    /// What the log shows of it.
    pub fn shown(&self) -> &[u8] {
        match self {
            Self::Plain(bytes) => bytes,
            Self::Masked { .. } => MASK,
        }
    }
}

impl Masker {
    /// At a place where masking may begin anew.
    pub fn new(patterns: Arc<Patterns>) -> Self {
        Self { patterns, held: Vec::new() }
    }

    /// Takes the next raw bytes, and gives what is certain by now.
    pub fn push(&mut self, raw: &Bytes) -> Vec<Piece> {
        if self.patterns.automaton.is_none() {
            return plain(raw, 0, raw.len()).into_iter().collect();
        }
        self.held.extend_from_slice(raw);
        let certain = self.held.len() - self.patterns.pending(&self.held);
        self.drain(certain, false)
    }

    /// Nothing follows: what was held back is no secret, but what is one.
    pub fn finish(&mut self) -> Vec<Piece> {
        self.drain(self.held.len(), true)
    }

    /// No match that isn't known yet begins before `certain`.
    fn drain(&mut self, certain: usize, at_end: bool) -> Vec<Piece> {
        let buffer = Bytes::from(std::mem::take(&mut self.held));
        let matches = self.patterns.matches(&buffer);
        let mut matches = matches.into_iter().peekable();
        let (mut pieces, mut done, mut plain_to) = (Vec::new(), 0, certain);
        while let Some((start, mut end)) = matches.next() {
            if start < done {
                continue;
            }
            if start >= certain {
                break;
            }
            let run = start + self.patterns.longest_run;
            while let Some((_, further)) = matches.next_if(|(next, _)| *next < end && *next < run) {
                end = end.max(further);
            }
            if !at_end && certain < end.min(run) {
                // It may grow yet.
                plain_to = start;
                break;
            }
            pieces.extend(plain(&buffer, done, start));
            pieces.push(Piece::Masked { raw: end - start });
            done = end;
        }
        let plain_to = plain_to.max(done);
        pieces.extend(plain(&buffer, done, plain_to));
        self.held = buffer.slice(plain_to..).to_vec();
        pieces
    }
}

fn plain(buffer: &Bytes, from: usize, to: usize) -> Option<Piece> {
    (from < to).then(|| Piece::Plain(buffer.slice(from..to)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn masked(patterns: &Arc<Patterns>, pieces: &[&[u8]]) -> Vec<Piece> {
        let mut masker = Masker::new(patterns.clone());
        let mut all: Vec<_> =
            pieces.iter().flat_map(|piece| masker.push(&Bytes::copy_from_slice(piece))).collect();
        all.extend(masker.finish());
        all
    }

    fn text(pieces: &[Piece]) -> Vec<u8> {
        pieces.iter().flat_map(Piece::shown).copied().collect()
    }

    fn check(secrets: &[&str], raw: &str, expected: &str) {
        let patterns = Arc::new(Patterns::of(secrets.iter().map(|secret| secret.as_bytes())).unwrap());
        let shown = text(&masked(&patterns, &[raw.as_bytes()]));
        assert_eq!(String::from_utf8_lossy(&shown), expected);
    }

    #[test]
    fn secrets_do_not_show() {
        check(&[], "nothing to hide", "nothing to hide");
        check(&["secret"], "a secret, and secretsecret", "a ***, and ******");
        check(&["abcdef", "defghi"], "abcdefghi.", "***.");
        check(&["secret", "secret-longer"], "secret-longer secret-long", "*** ***-long");
        check(&["short"], "short", "short");
        check(&["hunter2!"], "aHVudGVyMiE= https://x:hunter2%21@y", "*** https://x:***@y");
    }

    fn cuts(length: usize) -> impl Strategy<Value = Vec<usize>> {
        proptest::collection::vec(0..=length, 0..12)
    }

    fn stream() -> impl Strategy<Value = (Vec<Vec<u8>>, Vec<u8>, Vec<usize>)> {
        let letters =
            |range| proptest::collection::vec(prop_oneof![Just(b'a'), Just(b'b'), Just(b'c')], range);
        let patterns = proptest::collection::vec(letters(2..7), 0..5);
        (patterns, letters(0..120)).prop_flat_map(|(patterns, raw)| {
            let length = raw.len();
            (Just(patterns), Just(raw), cuts(length))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn however_it_is_cut_it_is_masked_the_same((patterns, raw, mut cuts) in stream(), longest_run in 3usize..40) {
            let patterns = Arc::new(Patterns::exactly(patterns, longest_run).unwrap());
            let whole = text(&masked(&patterns, &[&raw]));
            cuts.extend([0, raw.len()]);
            cuts.sort_unstable();
            let parts: Vec<_> = cuts.windows(2).map(|cut| &raw[cut[0]..cut[1]]).collect();
            let in_parts = masked(&patterns, &parts);
            prop_assert_eq!(text(&in_parts), whole.clone());
            let bytewise: Vec<_> = raw.chunks(1).collect();
            prop_assert_eq!(text(&masked(&patterns, &bytewise)), whole);
        }

        #[test]
        fn begun_anew_at_any_cut_it_gives_the_same((patterns, raw, _) in stream(), longest_run in 3usize..40) {
            let patterns = Arc::new(Patterns::exactly(patterns, longest_run).unwrap());
            let bytewise: Vec<_> = raw.chunks(1).collect();
            let pieces = masked(&patterns, &bytewise);
            let whole = text(&pieces);
            let (mut done, mut shown) = (0, Vec::new());
            for piece in pieces {
                let begins: Vec<(usize, Vec<u8>)> = match &piece {
                    Piece::Plain(bytes) => (1..=bytes.len()).map(|n| (n, bytes[..n].to_vec())).collect(),
                    Piece::Masked { raw } => vec![(*raw, MASK.to_vec())],
                };
                for (consumed, before) in &begins {
                    let rest = text(&masked(&patterns, &[&raw[done + consumed..]]));
                    prop_assert_eq!([shown.clone(), before.clone(), rest].concat(), whole.clone());
                }
                done += begins.last().unwrap().0;
                shown.extend_from_slice(&begins.last().unwrap().1);
            }
            prop_assert_eq!(done, raw.len());
        }

        /// Every byte that belongs to a secret is masked, every other shown (where no run is so long that it is cut).
        #[test]
        fn what_is_masked_is_what_matches((patterns, raw, _) in stream()) {
            let mut secret = vec![false; raw.len()];
            for pattern in &patterns {
                for at in 0..=raw.len().saturating_sub(pattern.len()) {
                    if raw[at..].starts_with(pattern) {
                        secret[at..at + pattern.len()].fill(true);
                    }
                }
            }
            let patterns = Arc::new(Patterns::exactly(patterns, usize::MAX / 2).unwrap());
            let mut at = 0;
            for piece in masked(&patterns, &[&raw]) {
                match piece {
                    Piece::Plain(bytes) => {
                        prop_assert!(secret[at..at + bytes.len()].iter().all(|secret| !secret));
                        at += bytes.len();
                    }
                    Piece::Masked { raw } => {
                        prop_assert!(secret[at..at + raw].iter().all(|secret| *secret));
                        at += raw;
                    }
                }
            }
        }

        #[test]
        fn little_is_held_back(raw in proptest::collection::vec(prop_oneof![Just(b'a'), Just(b'b')], 0..400)) {
            let patterns = Arc::new(Patterns::exactly(vec![b"aaaa".to_vec()], 16).unwrap());
            let mut masker = Masker::new(patterns);
            for byte in raw.chunks(1) {
                masker.push(&Bytes::copy_from_slice(byte));
                prop_assert!(masker.held.len() <= 16 + 2 * 4, "{}", masker.held.len());
            }
        }
    }
}
