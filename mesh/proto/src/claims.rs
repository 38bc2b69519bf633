//! What a node may say of itself: figures that no machine has are cut to ones that the planner can work with.
//!
//! A node measures itself and is believed: there is nobody else to ask. One that exaggerates within what machines can
//! do is found out by what its calls take. What no machine can do is a defect or a lie, and arithmetic on it would give
//! plans that make no sense (all experts to one node, a layer predicted in no time). Refuses to turn such a node away:
//! it may compute well.

use std::ops::RangeInclusive;

use mesh_wire::control::{Hello, Vitals};

/// Most memory that is believed, bytes: several times the experts of the largest models known (a trillion weights in
/// bf16), so that more would change no plan.
pub const MEMORY_BYTES_MAX: u64 = 16 << 40;

/// Most weight bandwidth that is believed, MB/s: above the memory of the fastest accelerators (8 TB/s).
pub const WEIGHT_MB_S_MAX: u32 = 10_000_000;

/// What became of a node's figures. Texts are for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claims {
    /// They are what machines have.
    Sound,
    /// It did not say how fast it is.
    Unmeasured(String),
    /// No machine has them: what the node says of its speed is not believed, either.
    Cut(String),
}

/// The hello with figures within bounds, and what became of them.
pub fn bounded(hello: Hello) -> (Hello, Claims) {
    let weight_mb_s = hello.weight_mb_s.map(|mb_s| mb_s.min(WEIGHT_MB_S_MAX));
    let memory_bytes = hello.memory_bytes.min(MEMORY_BYTES_MAX);
    let mut cut = Vec::new();
    if memory_bytes != hello.memory_bytes {
        let (said, counted) = (hello.memory_bytes >> 30, MEMORY_BYTES_MAX >> 30);
        cut.push(format!("claims {said} GiB of memory, counted as {counted}"));
    }
    if weight_mb_s != hello.weight_mb_s {
        let said = hello.weight_mb_s.iter().max().copied().unwrap_or(0) / 1000;
        cut.push(format!("claims to read weights at {said} GB/s, counted as {}", WEIGHT_MB_S_MAX / 1000));
    }
    let claims = if !cut.is_empty() {
        Claims::Cut(cut.join("; "))
    } else if weight_mb_s[0] == 0 {
        Claims::Unmeasured("says nothing of its speed, which is taken for ordinary".to_owned())
    } else {
        Claims::Sound
    };
    (Hello { memory_bytes, weight_mb_s, ..hello }, claims)
}

/// Temperatures that are believed, thousandths of a degree: what processors of any machine in a house or a shed show.
const TEMPERATURE_MC: RangeInclusive<i32> = -40_000..=150_000;

/// Most power that is believed of one machine, milliwatts: a rack's.
const POWER_MW_MAX: u32 = 20_000_000;

/// What a node says of its sensors, as far as it can be.
pub fn believable(vitals: Vitals) -> Vitals {
    Vitals {
        temperature_mc: vitals.temperature_mc.filter(|mc| TEMPERATURE_MC.contains(mc)),
        power_mw: vitals.power_mw.filter(|mw| *mw <= POWER_MW_MAX),
        ..vitals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_real_machines_pass() {
        for (memory_bytes, first) in [(0, 1), (1 << 30, 2_000), (MEMORY_BYTES_MAX, WEIGHT_MB_S_MAX)] {
            let hello = Hello { memory_bytes, weight_mb_s: [first, first, 7, 1, 0], ..Hello::default() };
            assert_eq!(bounded(hello.clone()), (hello, Claims::Sound));
        }
    }

    #[test]
    fn what_no_machine_has_is_cut_and_said() {
        let hello = Hello { memory_bytes: 1 << 50, weight_mb_s: [5, u32::MAX, 0, 3, 0], ..Hello::default() };
        let (counted, claims) = bounded(hello);
        assert_eq!((counted.memory_bytes, counted.weight_mb_s), (16 << 40, [5, 10_000_000, 0, 3, 0]));
        let Claims::Cut(note) = claims else { panic!("{claims:?}") };
        assert!(note.contains("1048576 GiB of memory, counted as 16384"), "{note}");
        assert!(note.contains("4294967 GB/s, counted as 10000"), "{note}");
        let (counted, claims) = bounded(Hello { memory_bytes: u64::MAX, ..Hello::default() });
        assert!(counted.memory_bytes == MEMORY_BYTES_MAX && matches!(claims, Claims::Cut(_)));
        assert!(matches!(bounded(Hello::default()).1, Claims::Unmeasured(_)));
    }

    #[test]
    fn temperatures_and_powers_that_cannot_be_are_unavailable() {
        let shown = |mc, mw| {
            let vitals = Vitals { temperature_mc: Some(mc), power_mw: Some(mw), ..Vitals::default() };
            let vitals = believable(vitals);
            (vitals.temperature_mc, vitals.power_mw)
        };
        assert_eq!(shown(71_000, 65_000), (Some(71_000), Some(65_000)));
        assert_eq!(shown(-273_000, u32::MAX - 1), (None, None));
        assert_eq!(shown(i32::MAX, 0), (None, Some(0)));
    }
}
