//! Places in an output that is read from a ring: a supervisor gives each new reader the last 256 KiB once more, and does not
//! say where in the output they begin. Pure.

/// What a supervisor replays.
pub(crate) const RING: usize = 256 * 1024;
/// So many bytes before a place are remembered, to find it again.
const TAIL: usize = 96;

/// A supervisor reads its ring in pieces of so many bytes, of which only the last is shorter. What a terminal says later comes in
/// pieces as it was written.
const PIECE: usize = 4096;

/// What a first replay tells of the output before it: a supervisor says neither how much there was nor where its ring ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beginning {
    /// It can't be told yet.
    Unclear,
    /// The ring was not full: its beginning is the output's.
    Whole,
    /// The ring was full, and may have been for long.
    MayBeMissing,
}

impl Beginning {
    /// What the next piece tells, where `before` came in full pieces before it.
    pub(crate) fn after(before: usize, piece: usize) -> Self {
        match before.saturating_add(piece) {
            _ if piece != PIECE => Self::Whole,
            RING.. => Self::MayBeMissing,
            _ => Self::Unclear,
        }
    }
}

/// A place in an output: how many bytes are before it, and the last of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) offset: u64,
    tail: Vec<u8>,
}

/// Where a place is in a replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// The output goes on after so many bytes of it.
    After(usize),
    /// Not in it so far.
    NotYet,
    /// It is no more in the ring: what is there follows a gap.
    Lost,
}

impl Place {
    pub(crate) fn new(offset: u64, tail: Vec<u8>) -> Self {
        Self { offset, tail }
    }

    /// The last bytes before it.
    pub(crate) fn tail(&self) -> &[u8] {
        &self.tail
    }

    /// The place after some further bytes.
    pub(crate) fn advanced(mut self, bytes: &[u8]) -> Self {
        self.offset = self.offset.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        self.tail.extend_from_slice(bytes);
        self.tail.drain(..self.tail.len().saturating_sub(TAIL));
        self
    }

    /// Looks for the place in what a new reader was given so far.
    ///
    /// A replay that is the whole output is told by what stands where the place must be. In one that begins later the
    /// place is where its tail occurs; of several, the first, so that bytes come twice rather than not at all.
    pub(crate) fn find(&self, replay: &[u8]) -> Found {
        if self.offset == 0 {
            return Found::After(0);
        }
        let whole = usize::try_from(self.offset).ok().filter(|offset| *offset <= RING);
        if let Some(offset) = whole {
            match replay.get(..offset) {
                Some(before) if before.ends_with(&self.tail) => return Found::After(offset),
                Some(_) => {}
                None => return Found::NotYet,
            }
        }
        // A shorter tail is that of a place near the beginning, which is no more there.
        let found = match self.tail.len() {
            TAIL => replay.windows(TAIL).position(|window| window == self.tail),
            _ => None,
        };
        match found {
            Some(at) => Found::After(at + self.tail.len()),
            None if replay.len() < RING => Found::NotYet,
            None => Found::Lost,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(bytes: usize) -> Vec<u8> {
        (0..bytes / 8 + 1).flat_map(|line| format!("{line:07}\n").into_bytes()).take(bytes).collect()
    }

    #[test]
    fn a_full_ring_is_told_by_its_pieces() {
        let told = |output: usize| {
            let mut before = 0;
            loop {
                let piece = (output - before).min(PIECE);
                match Beginning::after(before, piece) {
                    Beginning::Unclear if before + piece < output => before += piece,
                    told => return told,
                }
            }
        };
        for (output, expected) in [
            (1, Beginning::Whole),
            (PIECE, Beginning::Unclear),
            (PIECE + 1, Beginning::Whole),
            (RING - 1, Beginning::Whole),
            (RING - PIECE, Beginning::Unclear),
            (RING, Beginning::MayBeMissing),
        ] {
            assert_eq!(told(output), expected, "{output}");
        }
    }

    #[test]
    fn a_place_is_found_in_a_replay_wherever_that_begins() {
        let all = output(3 * RING);
        for at in [0, 150, RING - 1, RING, RING + 1, 2 * RING] {
            let (before, _) = all.split_at(at);
            let place = Place::default().advanced(before);
            for end in [at, at + 1, at + RING / 2, at + RING] {
                let begin = end.saturating_sub(RING);
                let replay = &all[begin..end];
                // The tail before the place must be there too, to find it by.
                let expected = match at.checked_sub(begin) {
                    Some(after) if begin == 0 || after >= TAIL => Found::After(after),
                    _ => Found::Lost,
                };
                assert_eq!(place.find(replay), expected, "{at} in {begin}..{end}");
            }
        }
    }

    #[test]
    fn an_output_that_repeats_itself_is_told_by_its_length() {
        let all = vec![b'.'; 1000];
        let place = Place::default().advanced(&all[..500]);
        assert_eq!(place.find(&all[..400]), Found::NotYet);
        assert_eq!(place.find(&all), Found::After(500));
    }

    #[test]
    fn places_of_pieces_are_those_of_the_whole() {
        let all = output(1000);
        let mut place = Place::default();
        for piece in all.chunks(7) {
            place = place.advanced(piece);
        }
        assert_eq!(place, Place::default().advanced(&all));
    }
}
