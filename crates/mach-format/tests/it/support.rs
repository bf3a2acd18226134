//! Small checkpoints, written without the crate's own writer.

use std::path::Path;

use half::{bf16, f16};
use serde_json::{Map, Value, json};

/// A tensor in memory.
pub struct Tensor {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

pub fn tensor(name: &str, dtype: &'static str, shape: &[usize], data: Vec<u8>) -> Tensor {
    Tensor { name: name.to_owned(), dtype, shape: shape.to_vec(), data }
}

/// A plain tensor in `F32`, `F16` or `BF16`.
pub fn plain(name: &str, dtype: &'static str, shape: &[usize], values: &[f32]) -> Tensor {
    assert_eq!(shape.iter().product::<usize>(), values.len());
    tensor(name, dtype, shape, encode(dtype, values))
}

pub fn encode(dtype: &str, values: &[f32]) -> Vec<u8> {
    match dtype {
        "F32" => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        "F16" => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        "BF16" => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => panic!("{dtype}"),
    }
}

/// What is left of values after [`encode`].
pub fn rounded(dtype: &str, values: &[f32]) -> Vec<f32> {
    let round = |x: f32| match dtype {
        "F16" => f16::from_f32(x).to_f32(),
        "BF16" => bf16::from_f32(x).to_f32(),
        _ => x,
    };
    values.iter().map(|x| round(*x)).collect()
}

/// The three tensors of an MLX affine module. `q` holds one level per element; scales and biases one value per
/// group (of as many columns as the counts say). Packed as the format says: a little-endian bit stream along the input.
pub fn mlx(module: &str, shape: &[usize], bits: usize, q: &[u8], scales: &[f32], biases: &[f32], ty: &'static str) -> [Tensor; 3] {
    let cols = shape[shape.len() - 1];
    let group = q.len() / scales.len();
    let with_last = |n: usize| [&shape[..shape.len() - 1], &[n]].concat();
    let mut data = vec![0u8; q.len() * bits / 8];
    for (i, level) in q.iter().enumerate() {
        for bit in 0..bits {
            data[(i * bits + bit) / 8] |= (level >> bit & 1) << ((i * bits + bit) % 8);
        }
    }
    [
        tensor(&format!("{module}.weight"), "U32", &with_last(cols * bits / 32), data),
        plain(&format!("{module}.scales"), ty, &with_last(cols / group), scales),
        plain(&format!("{module}.biases"), ty, &with_last(cols / group), biases),
    ]
}

pub fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let mut header = Map::new();
    let mut data = Vec::new();
    for t in tensors {
        let start = data.len();
        data.extend(&t.data);
        header.insert(t.name.clone(), json!({ "dtype": t.dtype, "shape": t.shape, "data_offsets": [start, data.len()] }));
    }
    with_header(&Value::Object(header).to_string(), &data)
}

pub fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// A checkpoint with one weight file.
pub fn write(dir: &Path, config: &Value, tensors: &[Tensor]) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join("model.safetensors"), safetensors(tensors)).unwrap();
}

/// A checkpoint of shards with an index.
pub fn write_sharded(dir: &Path, config: &Value, shards: &[Vec<Tensor>]) {
    std::fs::create_dir_all(dir).unwrap();
    let mut map = Map::new();
    for (i, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        std::fs::write(dir.join(&name), safetensors(shard)).unwrap();
        map.extend(shard.iter().map(|t| (t.name.clone(), json!(name))));
    }
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string()).unwrap();
}

/// Values that look like weights: repeatable, both signs, no two rows alike.
pub fn weights(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next() + next() + next()).collect()
}
