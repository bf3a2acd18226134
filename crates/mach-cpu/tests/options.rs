//! Choosing kernels and threads.

use mach_cpu::{Cpu, CpuError, CpuOptions, KernelSet};

#[test]
fn names_round_trip() {
    for set in KernelSet::ALL {
        assert_eq!(KernelSet::parse(set.name()), Some(set));
    }
    assert_eq!(KernelSet::parse("AVX2"), None);
}

#[test]
fn a_set_that_the_processor_lacks_is_an_error() {
    let have = KernelSet::available();
    assert!(have.contains(&KernelSet::Scalar) && have.contains(&KernelSet::automatic()));
    for set in KernelSet::ALL {
        match Cpu::new(CpuOptions { threads: Some(1), kernels: Some(set), ..CpuOptions::default() }) {
            Ok(cpu) => assert!(have.contains(&set) && cpu.kernel_set() == set),
            Err(e) => assert!(!have.contains(&set) && e.code() == "unsupported-kernels", "{e}"),
        }
    }
}

#[test]
fn no_threads_is_an_error() {
    assert!(matches!(Cpu::new(CpuOptions { threads: Some(0), ..CpuOptions::default() }), Err(CpuError::NoThreads)));
}
