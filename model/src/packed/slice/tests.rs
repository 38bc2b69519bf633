//! Rung: pure. What slices are is tested with the kernels (`kernel::native::tests::slices`); here: writing them.

use super::*;
use crate::format::{blocks, slice_width};
use crate::packed::TensorName;
use crate::synthetic::Synthetic;

fn expert(format: Format, (hidden, inter): (usize, usize)) -> PackedExpert {
    let mut bytes = Buffer::zeroed(format.expert_bytes(hidden, inter));
    bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at * 37 % 251) as u8);
    PackedExpert { format, hidden, inter, bytes: bytes.into() }
}

#[test]
fn runs_of_slices_that_cover_an_expert_cover_its_bytes_once() {
    for format in Format::ALL {
        for (hidden, inter) in [(16, 128), (40, 300), (64, 640)] {
            let mut times = vec![0_u8; format.expert_bytes(hidden, inter)];
            let count = blocks(inter) as u16;
            for (from, to) in [(0, 1), (1, count)].into_iter().filter(|(from, to)| from < to) {
                let mut len = 0;
                for run in runs(format, (hidden, inter), (from, to)).unwrap() {
                    len += run.len();
                    times[run].iter_mut().for_each(|times| *times += 1);
                }
                let width = slice_width(inter, (from, to)).unwrap();
                assert_eq!(len, format.expert_bytes(hidden, width));
            }
            assert!(times.iter().all(|times| *times == 1), "{format} {hidden} x {inter}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let whole = expert(Format::Q8, (32, 300));
    let mut out = vec![0; Format::Q8.expert_bytes(32, 128)];
    assert_eq!(whole.write_slice((1, 2), &mut out), Some(()));
    assert_eq!(whole.write_slice((1, 2), &mut out[1..]), None);
    assert_eq!(whole.write_slice((2, 4), &mut out), None);
    let short = PackedExpert { bytes: whole.bytes.slice(0, 1000).unwrap(), ..whole };
    assert_eq!(short.write_slice((1, 2), &mut out), None);
    assert_eq!(short.slice(1, 2).map(|slice| slice.inter), None);
}

#[test]
fn gathered_experts_lie_in_one_allocation_at_cache_lines() {
    let whole = expert(Format::Q4, (16, 300));
    let wanted = [(3, 128), (9, 300), (4, 44)];
    let parts = [(0, 1), (0, 3), (2, 3)];
    let write = |at: usize, out: &mut [u8]| whole.write_slice(parts[at], out).ok_or(());
    let gathered = gather((Format::Q4, 16), &wanted, write).unwrap();
    let start = gathered[0].1.bytes.as_ptr().addr();
    let mut at = 0;
    for (((index, expert), wanted), (from, to)) in gathered.iter().zip(wanted).zip(parts) {
        assert_eq!((*index, expert.inter), wanted);
        assert!(*expert.bytes == *whole.slice(from, to).unwrap().bytes);
        assert_eq!(expert.bytes.as_ptr().addr() - start, at);
        at += room(Format::Q4, 16, expert.inter);
        assert_eq!(at % 64, 0);
    }
    assert_eq!(
        gather((Format::Q4, 16), &wanted, |at, _| if at < 2 { Ok(()) } else { Err(7) }).err(),
        Some(7)
    );
}

#[test]
fn slices_of_made_up_experts_are_made_without_the_rest() {
    for format in Format::ALL {
        let made = Synthetic::parse("synthetic:olmoe-1b-7b?layers=1&seed=7", format).unwrap();
        let name = TensorName::Expert(0, 5);
        let (hidden, inter) = (made.config().hidden, made.config().moe.inter);
        let whole = PackedExpert { format, hidden, inter, bytes: made.tensor(name).unwrap() };
        for (from, to) in [(0, 8), (0, 1), (3, 5), (7, 8)] {
            let want = whole.slice(from, to).unwrap();
            let mut out = vec![0; want.bytes.len()];
            made.write_slice(name, (from, to), &mut out).unwrap();
            assert!(*out == *want.bytes, "{format} {from}..{to}");
        }
        assert_eq!(made.write_slice(name, (0, 9), &mut [0; 64]), None);
        assert_eq!(made.write_slice(name, (0, 1), &mut [0; 64]), None);
        assert_eq!(made.write_slice(TensorName::Head, (0, 1), &mut [0; 64]), None);
    }
}
