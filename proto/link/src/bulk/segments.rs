//! Bytes in slices that are not joined, so that prost reads and writes large fields without copying them.
use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf, BufMut, Bytes, BytesMut, buf::UninitSlice};

/// Slices of fewer bytes are copied together: a slice of its own costs more than the copy.
const SMALL: usize = 256;

/// A queue of slices. Bytes are read in the order in which they were written.
#[derive(Debug, Default, Clone)]
pub struct Segments {
    slices: VecDeque<Bytes>,
    /// The bytes that were written last and are not a slice yet.
    open: BytesMut,
    /// The number of bytes in `slices`.
    sealed: usize,
}

impl Segments {
    /// Appends a slice without copying it.
    pub fn push(&mut self, slice: Bytes) {
        self.seal();
        self.append(slice);
    }

    /// Removes the next slice; `None` if the queue is empty.
    pub fn pop(&mut self) -> Option<Bytes> {
        self.seal();
        let slice = self.slices.pop_front()?;
        self.sealed -= slice.len();
        Some(slice)
    }

    /// The first bytes, without taking them; `None` if there are fewer.
    pub(super) fn first<const COUNT: usize>(&self) -> Option<[u8; COUNT]> {
        let mut first = [0; COUNT];
        let mut found = self.slices.iter().flatten().chain(&self.open);
        for byte in &mut first {
            *byte = *found.next()?;
        }
        Some(first)
    }

    fn seal(&mut self) {
        if !self.open.is_empty() {
            let open = self.open.split().freeze();
            self.append(open);
        }
    }

    fn append(&mut self, slice: Bytes) {
        if !slice.is_empty() {
            self.sealed += slice.len();
            self.slices.push_back(slice);
        }
    }

    /// Removes empty slices from the front.
    fn tidy(&mut self) {
        while self.slices.front().is_some_and(Bytes::is_empty) {
            self.slices.pop_front();
        }
    }
}

impl Buf for Segments {
    fn remaining(&self) -> usize {
        self.sealed + self.open.len()
    }

    fn chunk(&self) -> &[u8] {
        self.slices.front().map_or(&self.open[..], |front| front)
    }

    fn advance(&mut self, count: usize) {
        let mut left = count;
        while let Some(front) = self.slices.front_mut() {
            let step = left.min(front.len());
            front.advance(step);
            self.sealed -= step;
            left -= step;
            self.tidy();
            if left == 0 {
                return;
            }
        }
        self.open.advance(left);
    }

    // The default implementation yields only one slice.
    fn chunks_vectored<'a>(&'a self, into: &mut [IoSlice<'a>]) -> usize {
        let open = std::iter::once(&self.open[..]).filter(|open| !open.is_empty());
        let slices = self.slices.iter().map(|slice| &slice[..]).chain(open);
        let mut filled = 0;
        for (to, slice) in into.iter_mut().zip(slices) {
            *to = IoSlice::new(slice);
            filled += 1;
        }
        filled
    }

    // The default implementation copies.
    fn copy_to_bytes(&mut self, count: usize) -> Bytes {
        match self.slices.front_mut() {
            Some(front) if count <= front.len() => {
                let taken = front.split_to(count);
                self.sealed -= count;
                self.tidy();
                taken
            }
            _ => {
                let mut joined = BytesMut::with_capacity(count);
                joined.put(self.take(count));
                joined.freeze()
            }
        }
    }
}

// SAFETY: the remaining capacity and the writable chunk are those of the BytesMut, which is written to directly.
#[expect(
    unsafe_code,
    reason = "the trait requires it; both functions are BytesMut's own"
)]
unsafe impl BufMut for Segments {
    fn remaining_mut(&self) -> usize {
        self.open.remaining_mut()
    }

    unsafe fn advance_mut(&mut self, count: usize) {
        // SAFETY: the caller has initialized this many bytes of `chunk_mut`, which belong to this BytesMut.
        unsafe { self.open.advance_mut(count) }
    }

    fn chunk_mut(&mut self) -> &mut UninitSlice {
        self.open.chunk_mut()
    }

    // The default implementation copies.
    fn put<T: Buf>(&mut self, mut source: T) {
        while source.has_remaining() {
            let count = source.chunk().len();
            if count < SMALL {
                self.open.extend_from_slice(source.chunk());
                source.advance(count);
            } else {
                let slice = source.copy_to_bytes(count);
                self.push(slice);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn large_slices_are_not_copied() {
        let large = Bytes::from(vec![7; 70_000]);
        let mut segments = Segments::default();
        segments.put_u8(1);
        segments.put(large.clone());
        assert_eq!(segments.remaining(), 70_001);
        assert_eq!(segments.get_u8(), 1);
        let out = segments.copy_to_bytes(70_000);
        assert_eq!(out.as_ptr(), large.as_ptr());
        assert!(!segments.has_remaining());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            pieces in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..600), any::<bool>()), 0..8),
            steps in prop::collection::vec((1_usize..500, any::<bool>()), 0..40),
        ) {
            let (mut segments, mut all) = (Segments::default(), Vec::new());
            for (piece, whole) in &pieces {
                all.extend_from_slice(piece);
                if *whole {
                    segments.push(Bytes::copy_from_slice(piece));
                } else {
                    segments.put(&piece[..]);
                }
            }
            let mut slices = [IoSlice::new(&[]); 32];
            let filled = segments.chunks_vectored(&mut slices);
            let listed: Vec<u8> = slices[..filled].iter().flat_map(|slice| slice.iter().copied()).collect();
            prop_assert_eq!(&listed, &all);
            let mut found = Vec::new();
            for (step, skipped) in steps {
                let step = step.min(segments.remaining());
                if skipped {
                    let before = found.len();
                    segments.clone().take(step).copy_to_slice(&mut vec![0; step]);
                    found.extend_from_slice(&all[before..before + step]);
                    segments.advance(step);
                } else {
                    found.extend_from_slice(&segments.copy_to_bytes(step));
                }
                prop_assert_eq!(segments.remaining(), all.len() - found.len());
            }
            while let Some(slice) = segments.pop() {
                found.extend_from_slice(&slice);
            }
            prop_assert_eq!(found, all);
        }
    }
}
