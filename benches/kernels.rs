//! Products and attention alone, in the shapes of the default model (SmolLM2-135M).

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use inwit::model::kernels::{
    AttentionShape, ComputePool, KV_BLOCK, KvLayer, KvType, PackedMatrix, QuantKind, Rounding,
    SpanRows, WeightFormat, attend,
};

/// `[outputs, inputs]`: attention in, attention out, MLP in, MLP out; and how the engine rounds
/// their inputs before it multiplies them by weights of few bits.
const SHAPES: [((usize, usize), Rounding); 4] = [
    ((960, 576), Rounding::Twice),
    ((576, 576), Rounding::Twice),
    ((3072, 576), Rounding::Once),
    ((576, 1536), Rounding::Twice),
];
/// Of the embedding and the head.
const VOCABULARY: (usize, usize) = (49_152, 576);
const ROWS: [usize; 4] = [1, 4, 16, 256];
const ATTENTION: AttentionShape = AttentionShape {
    heads: 9,
    kv_heads: 3,
    head_dim: 64,
    scale: 0.125,
    window: None,
};
/// Numbers of a row's queries.
const WIDTH: usize = ATTENTION.heads * ATTENTION.head_dim;

/// Numbers in (-1, 1) that repeat.
fn numbers(count: usize) -> Vec<f32> {
    (0..count)
        .map(|i| ((i * 7919) % 2003) as f32 / 1001.5 - 1.0)
        .collect()
}

fn products(c: &mut Criterion) {
    let mut group = c.benchmark_group("product");
    let mut time = |weight: &PackedMatrix, (outputs, inputs): (usize, usize)| {
        for rows in ROWS {
            let x = numbers(rows * inputs);
            // Multiply-adds.
            group.throughput(Throughput::Elements((rows * outputs * inputs) as u64));
            let name = format!("{}/{outputs}x{inputs}", weight.held_as());
            group.bench_function(BenchmarkId::new(name, rows), |b| {
                b.iter(|| weight.product(black_box(&x)));
            });
        }
    };
    for ((outputs, inputs), rounding) in SHAPES {
        let weight = numbers(outputs * inputs);
        let packed = |format| PackedMatrix::pack(&weight, outputs, inputs, format);
        let blocks = q4_1(outputs * inputs);
        for weight in [
            packed(WeightFormat::F32),
            packed(WeightFormat::Bf16),
            packed(WeightFormat::Q8_0),
            PackedMatrix::pack_blocks(&blocks, outputs, inputs, QuantKind::Q4_1),
        ] {
            time(&weight.with_inputs_rounded(rounding), (outputs, inputs));
        }
    }
    let (outputs, inputs) = VOCABULARY;
    let weight = numbers(outputs * inputs);
    let head = PackedMatrix::pack(&weight, outputs, inputs, WeightFormat::Q8_0);
    time(&head, VOCABULARY);
    group.finish();
}

/// As in a forward pass, where a matrix comes from memory: each product takes the next of sixty.
fn products_from_memory(c: &mut Criterion) {
    let mut group = c.benchmark_group("product from memory");
    for ((outputs, inputs), rounding) in SHAPES {
        let blocks = q4_1(outputs * inputs);
        let weight = || PackedMatrix::pack_blocks(&blocks, outputs, inputs, QuantKind::Q4_1);
        let weights: Vec<_> = (0..60)
            .map(|_| weight().with_inputs_rounded(rounding))
            .collect();
        for rows in [1, 4, 16] {
            let x = numbers(rows * inputs);
            group.throughput(Throughput::Elements((rows * outputs * inputs) as u64));
            let name = format!("q4_1/{outputs}x{inputs}");
            let mut turns = weights.iter().cycle();
            group.bench_function(BenchmarkId::new(name, rows), |b| {
                b.iter(|| turns.next().map(|weight| weight.product(black_box(&x))));
            });
        }
    }
    group.finish();
}

/// Blocks of 32 weights as a GGUF file holds them: a scale of 1/256, a minimum of -1/32, 4-bit numbers.
fn q4_1(weights: usize) -> Vec<u8> {
    let quants = |block: usize| (0..16).map(move |i| (block * 31 + i * 7) as u8);
    let block = |block| [0x00, 0x1c, 0x00, 0xa8].into_iter().chain(quants(block));
    (0..weights / 32).flat_map(block).collect()
}

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention");
    for kv_type in [KvType::F32, KvType::Bf16, KvType::Bf16I8] {
        // Streams that decode, then the last rows of one long prompt.
        for (streams, rows, positions) in [(1, 1, 512), (16, 1, 128), (16, 1, 512), (1, 64, 4000)] {
            let per_stream = positions / KV_BLOCK;
            let kv = filled(kv_type, streams * per_stream);
            let blocks: Vec<u32> = (0..(streams * per_stream) as u32).collect();
            let spans: Vec<SpanRows<'_>> = (0..streams)
                .map(|stream| SpanRows {
                    first_row: stream * rows,
                    rows,
                    start: positions - rows,
                    blocks: &blocks[stream * per_stream..(stream + 1) * per_stream],
                })
                .collect();
            let q = numbers(streams * rows * WIDTH);
            let name = format!("{kv_type}/{streams}x{rows}x{positions}");
            group.bench_function(name, |b| {
                b.iter(|| attend(black_box(&q), WIDTH, &ATTENTION, &kv, &spans));
            });
        }
    }
    group.finish();
}

/// Eight streams that decode and a piece of a long prompt on two threads, as in a forward pass: each
/// call reads another layer.
fn attention_from_memory(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention from memory");
    let pool = ComputePool::new(2).expect("two threads");
    let (streams, context, positions) = (8, 304, 4000);
    let per_stream = context / KV_BLOCK;
    let blocks: Vec<u32> = (0..(streams * per_stream + positions / KV_BLOCK) as u32).collect();
    let (contexts, prompt) = blocks.split_at(streams * per_stream);
    let layers: Vec<KvLayer> = (0..30)
        .map(|_| filled(KvType::Bf16, blocks.len()))
        .collect();
    for rows in [12, 16, 22, 512] {
        let streams = contexts.chunks(per_stream).enumerate();
        let mut spans: Vec<SpanRows<'_>> = streams
            .map(|(stream, blocks)| SpanRows {
                first_row: stream,
                rows: 1,
                start: context - 1,
                blocks,
            })
            .collect();
        spans.push(SpanRows {
            first_row: spans.len(),
            rows,
            start: positions - rows,
            blocks: prompt,
        });
        let q = numbers((spans.len() - 1 + rows) * WIDTH);
        // Of the prompt.
        group.throughput(Throughput::Elements((2 * rows * positions * WIDTH) as u64));
        let mut turns = layers.iter().cycle();
        group.bench_function(format!("bf16/8x1x{context} 1x{rows}x{positions}"), |b| {
            pool.install(|| {
                b.iter(|| {
                    let layer = turns.next();
                    layer.map(|layer| attend(black_box(&q), WIDTH, &ATTENTION, layer, &spans))
                });
            });
        });
    }
    group.finish();
}

fn filled(kv_type: KvType, blocks: usize) -> KvLayer {
    let mut kv = KvLayer::new(kv_type, &ATTENTION, blocks);
    let width = ATTENTION.kv_heads * ATTENTION.head_dim;
    let (key, value) = (numbers(width), numbers(width));
    for block in 0..blocks as u32 {
        for slot in 0..KV_BLOCK {
            kv.write(&ATTENTION, block, slot, &key, &value);
        }
    }
    kv
}

criterion_group!(
    benches,
    products,
    products_from_memory,
    attention,
    attention_from_memory
);
criterion_main!(benches);
