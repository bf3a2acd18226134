//! The sidecar as a file format: what is written, what is noticed, what survives.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use mach_format::sidecar::{LayerOutcome, LayerShape, SidecarPlan, VerifyReport, info, verify};
use mach_format::{Fingerprint, FormatError, PackedLayout, RecordLayout, ScaleType, Sidecar, SidecarWriter, WeightFormat, checksum};
use tempfile::tempdir;

const EXPERTS: usize = 5;
const LAYERS: [usize; 2] = [1, 3];

fn layout() -> RecordLayout {
    let format = WeightFormat::Affine { bits: 4, group: 32, scales: ScaleType::F16 };
    RecordLayout::new(PackedLayout::new(24, 64, format), PackedLayout::new(64, 32, WeightFormat::BF16))
}

fn plan() -> SidecarPlan {
    SidecarPlan { model_type: "m".to_owned(), experts: EXPERTS, layers: LAYERS.map(|layer| LayerShape { layer, layout: layout() }).to_vec() }
}

fn source(n: u8) -> Fingerprint {
    Fingerprint([n; 32])
}

/// Byte `i` of a part: different for every layer, expert and part.
fn pattern(layer: usize, expert: usize, part: usize, i: usize) -> u8 {
    (i * 31 + layer * 7 + expert * 3 + part * 101) as u8
}

fn fill(layer: usize) -> impl Fn(usize, &mut [u8], &mut [u8]) -> Result<(), FormatError> + Sync {
    move |expert, gate_up, down| {
        assert_eq!([gate_up.len(), down.len()], layout().part_bytes);
        for (part, bytes) in [gate_up, down].into_iter().enumerate() {
            bytes.iter_mut().take(1000).enumerate().for_each(|(i, b)| *b = pattern(layer, expert, part, i));
        }
        Ok(())
    }
}

fn build(dir: &Path, from: u8) -> Vec<LayerOutcome> {
    let mut writer = SidecarWriter::create(dir, &source(from), plan()).unwrap();
    let outcomes = LAYERS.map(|layer| writer.write_layer(layer, fill(layer), &mut |_| ()).unwrap());
    writer.finish(&source(from)).unwrap();
    outcomes.to_vec()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn code<T>(result: Result<T, FormatError>) -> &'static str {
    result.err().map_or("ok", |e| e.code())
}

#[test]
fn records_lie_where_the_layout_says() {
    let dir = tempdir().unwrap();
    build(dir.path(), 1);
    assert_eq!(names(dir.path()).len(), 3, "two layers and the manifest");
    let sidecar = Sidecar::open(dir.path(), &source(1)).unwrap();
    assert_eq!(sidecar.layers().iter().map(|l| l.layer).collect::<Vec<_>>(), LAYERS);
    for layer in sidecar.layers() {
        assert_eq!((layer.layout, layer.experts()), (layout(), EXPERTS));
        let file = fs::File::open(&layer.path).unwrap();
        for (expert, part) in (0..EXPERTS).flat_map(|e| [(e, 0), (e, 1)]) {
            let mut bytes = vec![0; layer.layout.part_bytes[part]];
            assert!(layer.offset(expert, part).is_multiple_of(4096) && bytes.len().is_multiple_of(4096));
            file.read_exact_at(&mut bytes, layer.offset(expert, part)).unwrap();
            assert!((0..1000).all(|i| bytes[i] == pattern(layer.layer, expert, part, i)));
            assert!(bytes[1000..].iter().all(|b| *b == 0));
            assert_eq!(layer.checksums[expert][part], checksum(&bytes));
            layer.check(expert, part, &bytes).unwrap();
        }
    }
    let report = verify(dir.path(), &mut |_, _| ()).unwrap();
    let records = LAYERS.len() * EXPERTS;
    assert_eq!(report, VerifyReport { layers: 2, records, bytes: (records * layout().stride()) as u64 });
    assert_eq!(info(dir.path()).unwrap().experts, EXPERTS);
}

#[test]
fn a_flipped_byte_anywhere_is_noticed() {
    let dir = tempdir().unwrap();
    build(dir.path(), 1);
    let path = Sidecar::open(dir.path(), &source(1)).unwrap().layers()[1].path.clone();
    let good = fs::read(&path).unwrap();
    let records = EXPERTS * layout().stride();
    let flip = |at: usize| {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        fs::write(&path, bad).unwrap();
    };

    // In a record: opening reads no records, verify and readers name it.
    let at = 2 * layout().stride() + layout().part_bytes[0] + 17;
    flip(at);
    assert!(Sidecar::open(dir.path(), &source(1)).is_ok());
    match verify(dir.path(), &mut |_, _| ()) {
        Err(FormatError::Checksum { layer: 3, expert: 2, part: "down", .. }) => (),
        other => panic!("{other:?}"),
    }
    // In padding, which readers read too.
    flip(layout().part_bytes[0] - 1);
    assert_eq!(code(verify(dir.path(), &mut |_, _| ())), "checksum-mismatch");
    // In index and trailer.
    for at in records..good.len() {
        flip(at);
        assert_eq!(code(Sidecar::open(dir.path(), &source(1))), "sidecar-corrupt", "byte {at}");
    }
    fs::write(&path, &good[..good.len() - 1]).unwrap();
    assert_eq!(code(Sidecar::open(dir.path(), &source(1))), "truncated-file");
    fs::remove_file(&path).unwrap();
    assert_eq!(code(Sidecar::open(dir.path(), &source(1))), "sidecar-corrupt");
}

#[test]
fn a_changed_manifest_is_noticed() {
    let dir = tempdir().unwrap();
    assert_eq!(code(Sidecar::open(dir.path(), &source(1))), "sidecar-missing");
    build(dir.path(), 1);
    let path = dir.path().join("manifest.json");
    let good = fs::read_to_string(&path).unwrap();
    let open = |text: &str| {
        assert_ne!(text, good, "the change applies");
        fs::write(&path, text).unwrap();
        code(Sidecar::open(dir.path(), &source(1)))
    };
    assert_eq!(open(&good.replace("\"version\": 1", "\"version\": 2")), "sidecar-version");
    assert_eq!(open(&good[..good.len() / 2]), "invalid-json");
    assert_eq!(open(&good.replace("\"group\": 32", "\"group\": 64")), "sidecar-corrupt");
    assert_eq!(open(&good.replace("\"group\": 32", "\"group\": 0")), "sidecar-corrupt");
    assert_eq!(open(&good.replace("\"bf16\"", "\"f16\"")), "sidecar-corrupt");
    assert_eq!(open(&good.replace("\"rows\": 24", "\"rows\": 18446744073709551615")), "sidecar-corrupt");
    assert_eq!(open(&good.replace("\"layer\": 3", "\"layer\": 2")), "sidecar-corrupt");
    assert_eq!(open(&good.replace("\"file\": \"layer", "\"file\": \"../layer")), "sidecar-corrupt");
    assert_eq!(open(&good.replace("\"experts\": 5", "\"experts\": 4")), "truncated-file");
}

#[test]
fn another_checkpoint_of_the_same_shapes_is_refused() {
    let dir = tempdir().unwrap();
    build(dir.path(), 1);
    match Sidecar::open(dir.path(), &source(2)) {
        Err(e @ FormatError::SidecarFingerprint { .. }) => assert!(e.to_string().contains(&source(2).to_string())),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_interrupted_build_goes_on() {
    let dir = tempdir().unwrap();
    {
        let mut writer = SidecarWriter::create(dir.path(), &source(1), plan()).unwrap();
        let missing = || plan().missing_bytes(dir.path(), &source(1));
        assert_eq!(missing(), plan().bytes());
        writer.write_layer(1, fill(1), &mut |_| ()).unwrap();
        assert_eq!(missing(), plan().bytes() / 2);
        // Killed in the middle of the second layer.
        fs::write(dir.path().join("layer-003-00000000.experts.tmp"), b"half").unwrap();
        assert_eq!(code(SidecarWriter::create(dir.path(), &source(1), plan())), "build-busy");
    }
    assert_eq!(code(Sidecar::open(dir.path(), &source(1))), "sidecar-missing", "no manifest before the end");
    assert_eq!(build(dir.path(), 1), [LayerOutcome::Kept, LayerOutcome::Written]);
    assert_eq!(build(dir.path(), 1), [LayerOutcome::Kept, LayerOutcome::Kept]);
    verify(dir.path(), &mut |_, _| ()).unwrap();
    // A file that is complete but for its last byte is written again.
    let path = Sidecar::open(dir.path(), &source(1)).unwrap().layers()[0].path.clone();
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert_eq!(build(dir.path(), 1), [LayerOutcome::Written, LayerOutcome::Kept]);
}

#[test]
fn a_failed_rebuild_leaves_the_old_sidecar_whole() {
    let dir = tempdir().unwrap();
    build(dir.path(), 1);
    let before = names(dir.path());
    {
        let mut writer = SidecarWriter::create(dir.path(), &source(2), plan()).unwrap();
        writer.write_layer(1, fill(1), &mut |_| ()).unwrap();
        let full = |_: usize, _: &mut [u8], _: &mut [u8]| Err(FormatError::DiskFull { path: dir.path().to_owned(), needed: 1, free: 0 });
        assert_eq!(code(writer.write_layer(3, full, &mut |_| ())), "disk-full");
        assert!(names(dir.path()).iter().all(|n| !n.ends_with(".tmp")));
        assert_eq!(code(writer.finish(&source(2))), "wrong-plan", "a layer is missing");
    }
    Sidecar::open(dir.path(), &source(1)).unwrap();
    verify(dir.path(), &mut |_, _| ()).unwrap();
    // Once the rebuild is done, nothing of the old one is left.
    assert_eq!(build(dir.path(), 2), [LayerOutcome::Kept, LayerOutcome::Written]);
    assert_eq!(names(dir.path()).len(), before.len());
    Sidecar::open(dir.path(), &source(2)).unwrap();
}

/// A device that is always full stands in for a full disk.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_has_a_name_and_leaves_no_temporary_file() {
    let (other, dir) = (tempdir().unwrap(), tempdir().unwrap());
    build(other.path(), 1);
    let file = names(other.path()).into_iter().find(|n| n.starts_with("layer-001")).unwrap();
    let mut writer = SidecarWriter::create(dir.path(), &source(1), plan()).unwrap();
    std::os::unix::fs::symlink("/dev/full", dir.path().join(format!("{file}.tmp"))).unwrap();
    match writer.write_layer(1, fill(1), &mut |_| ()) {
        Err(FormatError::DiskFull { path, needed, .. }) => assert!(path.ends_with(&file) && needed > 0),
        other => panic!("{other:?}"),
    }
    assert!(!names(dir.path()).iter().any(|n| n.starts_with("layer")));
}
