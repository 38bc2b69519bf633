//! What the backend refuses, and that it says why.

use super::experts::ExpertCase;
use super::*;

#[test]
fn calls_that_do_not_fit_are_refused_by_name() {
    let mut rng = Rng::new(5);
    let backend = native(Isa::best(), 1);
    let case = ExpertCase::random(&mut rng, 2, Format::Q4, false);
    let experts = case.load(&backend, &[0, 2]);
    let buffer = filled(Format::Q4, case.hidden, &case.xs);
    let x = Activations::new(Format::Q4, 2, case.hidden, &buffer).unwrap();
    let refusal = |a: Assignment| {
        let mut out = PartialSums::default();
        experts.run(x, &[a], &mut out).unwrap_err().to_string()
    };
    let good = Assignment { row: 0, expert: 0, weight: 1.0 };
    assert_eq!(refusal(Assignment { expert: 1, ..good }), "expert 1 is not held here");
    assert_eq!(refusal(Assignment { expert: 900, ..good }), "expert 900 is not held here");
    assert_eq!(refusal(Assignment { row: 2, ..good }), "row 2 of a batch of 2");
    assert!(refusal(Assignment { weight: f32::NAN, ..good }).contains("weight NaN for expert 0"));
    let wrong = filled(Format::Q8, case.hidden + 64, &[vec![1.0; case.hidden + 64]]);
    let wrong = Activations::new(Format::Q8, 1, case.hidden + 64, &wrong).unwrap();
    let mut out = PartialSums::default();
    assert!(experts.run(wrong, &[good], &mut out).unwrap_err().to_string().contains("for q8"));
    let mut forged = filled(Format::Q4, case.hidden, &case.xs);
    forged[3] = 0x80;
    let forged = Activations::new(Format::Q4, 2, case.hidden, &forged).unwrap();
    assert!(experts.run(forged, &[good], &mut out).unwrap_err().to_string().contains("-128"));
    assert!(experts.run_wide(forged, &[good], &mut Vec::new()).unwrap_err().to_string().contains("-128"));
}

#[test]
fn weights_that_do_not_fit_are_refused_by_name() {
    let mut rng = Rng::new(6);
    let backend = native(Isa::best(), 1);
    for (format, bits) in [(Format::Q4, 0x7c00u16), (Format::Q8, 0xfe01), (Format::Bf16, 0x7f80)] {
        let packed = Logical::random(&mut rng, format, (5, 40), false).packed();
        let mut bytes = Buffer::zeroed(packed.bytes.len());
        bytes.copy_from_slice(&packed.bytes);
        let at = if format.is_quantized() { format.group_bytes() - 32 } else { 6 };
        bytes[at..at + 2].copy_from_slice(&bits.to_le_bytes());
        let error = backend.linear(PackedMatrix { bytes: bytes.into(), ..packed.clone() }).unwrap_err();
        assert!(error.to_string().contains("NaN or infinite"), "{error}");
        let short = packed.bytes.slice(0, packed.bytes.len() - 64).unwrap();
        let error = backend.linear(PackedMatrix { bytes: short, ..packed }).unwrap_err();
        assert!(error.to_string().contains("bytes where"), "{error}");
    }
    let expert = || LogicalExpert::random(&mut Rng::new(7), Format::Q4, (32, 32), false).packed();
    let twice = backend.experts(vec![(1, expert()), (1, expert())], -10).unwrap_err();
    assert_eq!(twice.to_string(), "expert 1 was given twice");
    let step = backend.experts(vec![(1, expert())], 65).unwrap_err();
    assert!(step.to_string().contains("combine step 2^65"), "{step}");
}

#[test]
fn an_expert_with_an_infinite_scale_anywhere_is_refused_by_name() {
    let backend = native(Isa::best(), 1);
    for format in Format::ALL {
        let packed = LogicalExpert::random(&mut Rng::new(11), format, (40, 48), false).packed();
        let size = format.group_bytes();
        // The first group, one in the middle (up or down), the last.
        let groups = packed.bytes.len() / size;
        for group in [0, groups / 2, groups - 1] {
            for bits in
                if format.is_quantized() { [0x7c00u16, 0xfc00, 0x7e00] } else { [0x7f80, 0xff80, 0x7fc0] }
            {
                let mut bytes = Buffer::zeroed(packed.bytes.len());
                bytes.copy_from_slice(&packed.bytes);
                let at = (group + 1) * size - 2;
                bytes[at..at + 2].copy_from_slice(&bits.to_le_bytes());
                let broken = PackedExpert { bytes: bytes.into(), ..packed.clone() };
                let error = backend.experts(vec![(7, broken)], -10).unwrap_err().to_string();
                let named = error.contains("expert 7 of 40 x 48") && error.contains("NaN or infinite");
                assert!(named, "{format}, group {group}: {error}");
            }
        }
    }
}

#[test]
fn shapes_that_compute_nothing_or_do_not_agree_are_refused_by_name() {
    let backend = native(Isa::best(), 1);
    let empty = |outputs, inputs| {
        let matrix = PackedMatrix { format: Format::Q4, outputs, inputs, bytes: Buffer::zeroed(0).into() };
        backend.linear(matrix).unwrap_err().to_string()
    };
    assert!(empty(0, 32).contains("0 x 32 computes nothing"));
    assert!(empty(32, 0).contains("32 x 0 computes nothing"));
    let expert = |hidden| LogicalExpert::random(&mut Rng::new(12), Format::Q8, (hidden, 32), false).packed();
    let error = backend.experts(vec![(0, expert(64)), (3, expert(96))], -10).unwrap_err().to_string();
    assert!(error.contains("expert 3 is 96 x 32") && error.contains("width 64"), "{error}");
    // A matrix that says it is one output larger than its bytes: no multiple of the block hides that here.
    let packed = Logical::random(&mut Rng::new(13), Format::Q4, (16, 64), false).packed();
    let larger = PackedMatrix { outputs: 17, ..packed.clone() };
    assert!(backend.linear(larger).unwrap_err().to_string().contains("matrix of 17 x 64"));
    let wider = PackedMatrix { inputs: 65, ..packed };
    assert!(backend.linear(wider).unwrap_err().to_string().contains("matrix of 16 x 65"));
}

#[test]
fn settings_that_cannot_be_met_are_refused_by_name() {
    let error = "avx1024".parse::<Isa>().unwrap_err();
    assert!(error.contains("'avx1024'") && error.contains("scalar, neon, avx2, avx512, amx"), "{error}");
    for (threads, complaint) in [(0, "0 threads"), (1025, "1025 threads: give 1 to 1024")] {
        let error = Native::new(NativeConfig::threads(threads)).unwrap_err().to_string();
        assert!(error.contains(complaint), "{error}");
    }
}

#[test]
fn an_instruction_set_that_the_machine_lacks_is_refused_with_those_it_has() {
    let here: Vec<_> = Isa::available_here().collect();
    assert!(here[0] == Isa::Scalar && here.last() == Some(&Isa::best()));
    // No machine has both.
    assert!(!(Isa::Neon.available() && Isa::Avx2.available()));
    for isa in Isa::ALL {
        assert_eq!(isa.name().parse(), Ok(isa));
        let config = NativeConfig { isa: Some(isa), ..NativeConfig::threads(1) };
        if here.contains(&isa) {
            assert_eq!(Native::new(config).unwrap().isa(), isa.name());
            assert_eq!(Ops::new(isa).unwrap().isa(), isa);
            continue;
        }
        let error = Native::new(config).unwrap_err().to_string();
        assert!(error.contains(&format!("this machine has no {}", isa.name())), "{error}");
        assert!(here.iter().all(|isa| error.contains(isa.name())), "{error}");
        assert!(Ops::new(isa).is_err());
    }
}
