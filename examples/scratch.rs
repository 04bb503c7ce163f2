use inwit::model::kernels::*;
use std::time::Instant;
fn main() {
    for (o, i) in [(1536usize * 2, 576usize), (576, 1536), (49152, 576)] {
        let w: Vec<f32> = (0..o * i).map(|k| (k % 17) as f32).collect();
        for f in [WeightFormat::F32, WeightFormat::Bf16] {
            let p = PackedMatrix::pack(&w, o, i, f);
            for rows in [1usize, 4, 16, 128, 512] {
                if o > 10000 && rows > 16 {
                    continue;
                }
                let x: Vec<f32> = (0..rows * i).map(|k| (k % 7) as f32).collect();
                let n = (2_000_000_000 / (rows * o * i)).clamp(3, 300);
                let y = p.product(&x);
                let t = Instant::now();
                let mut s = 0.0;
                for _ in 0..n {
                    s += p.product(&x)[0];
                }
                let d = t.elapsed().as_secs_f64() / n as f64;
                println!(
                    "{o}x{i} {f} rows {rows}: {:.1} us {:.1} GFLOP/s {:.1} GB/s {s} {}",
                    d * 1e6,
                    2.0 * (rows * o * i) as f64 / d / 1e9,
                    p.bytes() as f64 / d / 1e9,
                    y[0]
                );
            }
        }
    }
}
