//! The forms in which a secret may show in an output: as it is, in base64, URL-encoded, JSON-escaped; each line of it.

use std::collections::BTreeSet;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};

/// What is shorter is not masked: masking `a` would mask everything.
pub(super) const SHORTEST: usize = 6;

/// A longer secret is masked piece by piece. A multiple of 3, so that the pieces' base64 is the whole's.
const PIECE: usize = 4095;

/// Line lengths at which `base64` and PEM files are broken.
const BASE64_LINES: [usize; 2] = [76, 64];

/// Every form of a secret, each at least [`SHORTEST`] bytes.
pub(super) fn forms(secret: &[u8]) -> BTreeSet<Vec<u8>> {
    let mut forms = BTreeSet::new();
    let lines = secret.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    for unit in [secret, secret.trim_ascii()].into_iter().chain(lines) {
        for piece in unit.chunks(PIECE) {
            if piece.len() >= SHORTEST {
                add_forms(&mut forms, piece);
            }
        }
    }
    forms.retain(|form| form.len() >= SHORTEST);
    forms
}

fn add_forms(forms: &mut BTreeSet<Vec<u8>>, unit: &[u8]) {
    forms.insert(unit.to_vec());
    for alphabet in [&STANDARD, &URL_SAFE] {
        for before in 0..3 {
            forms.insert(base64_within(alphabet, unit, before));
        }
        let whole = alphabet.encode(unit);
        for length in BASE64_LINES {
            forms.extend(whole.as_bytes().chunks(length).map(<[u8]>::to_vec));
        }
        forms.insert(whole.trim_end_matches('=').into());
        forms.insert(whole.into());
    }
    for kept in ["-_.~", "-_.!~*'()", "-_.*"] {
        forms.insert(percent(unit, kept, false));
        forms.insert(percent(unit, kept, true));
    }
    // A form's `+` for a space.
    forms.insert(replaced(&percent(unit, "-_.*", false), b"%20", b"+"));
    if let Ok(text) = std::str::from_utf8(unit) {
        let quoted = serde_json::Value::from(text).to_string();
        let escaped = quoted.trim_matches('"');
        // As JSON writers differ: the slash escaped or not, other letters as they are or as UTF-16.
        for text in [escaped.to_owned(), ascii(escaped)] {
            forms.insert(text.replace('/', "\\/").into());
            forms.insert(text.into());
        }
    }
}

/// The base64 digits that `unit` alone determines where `before` bytes (modulo 3) stand before it.
fn base64_within(alphabet: &base64::engine::GeneralPurpose, unit: &[u8], before: usize) -> Vec<u8> {
    let padded = [vec![0; before].as_slice(), unit].concat();
    let encoded = alphabet.encode(&padded);
    let (first, last) = ((before * 8).div_ceil(6), padded.len() * 8 / 6);
    encoded.as_bytes().get(first..last).unwrap_or_default().to_vec()
}

fn percent(unit: &[u8], kept: &str, lower_case: bool) -> Vec<u8> {
    let mut encoded = Vec::with_capacity(unit.len() * 3);
    for byte in unit {
        if byte.is_ascii_alphanumeric() || kept.as_bytes().contains(byte) {
            encoded.push(*byte);
        } else if lower_case {
            encoded.extend(format!("%{byte:02x}").bytes());
        } else {
            encoded.extend(format!("%{byte:02X}").bytes());
        }
    }
    encoded
}

fn replaced(text: &[u8], what: &[u8], by: &[u8]) -> Vec<u8> {
    let mut result = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, others)) = rest.split_first() {
        if let Some(after) = rest.strip_prefix(what) {
            result.extend_from_slice(by);
            rest = after;
        } else {
            result.push(*first);
            rest = others;
        }
    }
    result
}

fn ascii(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_ascii() {
            result.push(letter);
        } else {
            for unit in letter.encode_utf16(&mut [0; 2]) {
                result.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn contains(text: &[u8], form: &[u8]) -> bool {
        text.windows(form.len()).any(|window| window == form)
    }

    #[test]
    fn a_secret_in_each_encoding() {
        let secret = "p/ss w\"rd+ü\nsecond line";
        let forms = forms(secret.as_bytes());
        for shown in [
            "p/ss w\"rd+ü",
            "second line",
            "p%2Fss%20w%22rd%2B%C3%BC",
            "p%2fss%20w%22rd%2b%c3%bc",
            "p%2Fss+w%22rd%2B%C3%BC",
            "p/ss w\\\"rd+ü\\nsecond line",
            "p\\/ss w\\\"rd+\\u00fc\\nsecond line",
            "cC9zcyB3InJkK8O8",
        ] {
            assert!(forms.contains(shown.as_bytes()), "{shown}");
        }
    }

    #[test]
    fn what_is_short_is_none() {
        assert!(forms(b"").is_empty());
        assert!(forms(b"short").is_empty());
        assert_eq!(forms(b"a\nb\nc").len(), forms(b"x").len());
    }

    proptest! {
        #[test]
        fn base64_of_anything_with_the_secret_in_it_shows_a_form(
            before in proptest::collection::vec(any::<u8>(), 0..10),
            secret in proptest::collection::vec(any::<u8>(), 9..40),
            after in proptest::collection::vec(any::<u8>(), 0..10),
        ) {
            let forms = forms(&secret);
            let whole = [before.clone(), secret.clone(), after].concat();
            for alphabet in [&STANDARD, &URL_SAFE] {
                let encoded = alphabet.encode(&whole);
                let within = base64_within(alphabet, &secret, before.len() % 3);
                prop_assert!(forms.contains(&within));
                prop_assert!(contains(encoded.as_bytes(), &within));
                // No more than the digits at the borders are left.
                prop_assert!(within.len() * 6 + 10 >= secret.len() * 8);
            }
        }
    }
}
