//! Algebra, files and refusals.

use std::fs;

use tempfile::TempDir;

use super::*;
use crate::diffusion::testing;

fn layers() -> Vec<Written> {
    [
        "unet.down.0.to_q",
        "unet.down.0.proj_in",
        "text_encoder.encoder.layers.0.mlp.fc1",
    ]
    .iter()
    .map(|name| Written {
        name: (*name).to_owned(),
        pixel: name.ends_with("proj_in"),
    })
    .collect()
}

fn lora(seed: &str, rank: usize) -> Lora {
    let pairs = layers()
        .into_iter()
        .map(|layer| {
            let values = |half: &str, shape: &[usize]| {
                testing::values(
                    &format!("{seed}{half}{}", layer.name),
                    shape,
                    1.0,
                    Kind::Float,
                )
            };
            let pair = Pair {
                down: values("a", &[rank, 7]),
                up: values("b", &[5, rank]),
                scale: 0.5,
            };
            (layer.name, pair)
        })
        .collect();
    Lora { pairs }
}

fn apart(a: &Lora, b: &Lora) -> f64 {
    assert_eq!(
        a.pairs.keys().collect::<Vec<_>>(),
        b.pairs.keys().collect::<Vec<_>>()
    );
    a.pairs
        .keys()
        .map(|name| {
            testing::apart(
                &a.change(name).unwrap().unwrap(),
                &b.change(name).unwrap().unwrap(),
            )
        })
        .fold(0.0, f64::max)
}

#[test]
fn the_mean_of_adapters_is_exact_and_ranks_add_up() {
    let (a, b) = (lora("x", 2), lora("y", 3));
    let mean = Lora::sum(&[(&a, 0.5), (&b, 0.5)]).unwrap();
    assert_eq!(mean.rank(), 5);
    for name in mean.pairs.keys() {
        let sum = (a.change(name).unwrap().unwrap() + b.change(name).unwrap().unwrap()) * 0.5;
        assert!(testing::apart(&mean.change(name).unwrap().unwrap(), &sum) < 1e-6);
    }
}

#[test]
fn cutting_the_rank_is_lossless_where_it_can_be_and_best_elsewhere() {
    let two = lora("x", 2);
    let doubled = Lora::sum(&[(&two, 0.5), (&two, 0.5)]).unwrap();
    assert_eq!(doubled.rank(), 4);
    let (cut, lost) = doubled.truncated(2).unwrap();
    assert_eq!(cut.rank(), 2);
    assert!(lost < 1e-12, "{lost}");
    assert!(apart(&cut, &two) < 1e-5);

    let (one, lost) = two.truncated(1).unwrap();
    assert_eq!(one.rank(), 1);
    let (mut all, mut left) = (0.0, 0.0);
    for name in two.pairs.keys() {
        let full = two.change(name).unwrap().unwrap();
        let rest = &full - one.change(name).unwrap().unwrap();
        all += full.square().sum(Kind::Double).double_value(&[]);
        left += rest.square().sum(Kind::Double).double_value(&[]);
    }
    assert!((lost - left / all).abs() < 1e-6, "{lost} {}", left / all);
    assert!(lost > 0.01 && lost < 0.5, "{lost}");
    // More rank than there is loses nothing.
    assert!(apart(&two.truncated(50).unwrap().0, &two) < 1e-5);
    assert!(two.truncated(0).is_err());
}

#[test]
fn cut_pairs_of_small_and_large_layers_have_one_rank() {
    let mut wide = lora("x", 6);
    let small = wide.pairs.get_mut("unet.down.0.to_q").unwrap();
    small.down = testing::values("down", &[6, 3], 1.0, Kind::Float);
    let (cut, lost) = wide.truncated(4).unwrap();
    for (name, pair) in &cut.pairs {
        assert_eq!(pair.down.size()[0], 4, "{name}");
        assert_eq!(pair.up.size()[1], 4, "{name}");
    }
    assert!(lost > 0.0 && lost < 0.5, "{lost}");
    // Three inputs need no more than rank 3.
    let apart = testing::apart(
        &cut.change("unet.down.0.to_q").unwrap().unwrap(),
        &wide.change("unet.down.0.to_q").unwrap().unwrap(),
    );
    assert!(apart < 1e-5, "{apart}");
}

#[test]
fn both_layouts_survive_a_file() {
    let folder = TempDir::new().unwrap();
    let lora = lora("x", 3);
    for layout in [Layout::Diffusers, Layout::Kohya] {
        let file = folder.path().join(format!("{layout:?}.safetensors"));
        let notes = [("b", "2"), ("a", "1"), ("c", "3")];
        lora.write(&file, layout, &layers(), &notes).unwrap();
        let read = Lora::read(&file, &layers()).unwrap();
        assert!(apart(&read, &lora) < 1e-6);
        let bytes = fs::read(&file).unwrap();
        lora.write(&file, layout, &layers(), &notes).unwrap();
        assert_eq!(bytes, fs::read(&file).unwrap());
        let weights = crate::weights::WeightsFile::open(&file).unwrap();
        assert_eq!(weights.note("b"), Some("2"));
        let expected = match layout {
            Layout::Diffusers => "unet.down.0.proj_in.lora_A.weight",
            Layout::Kohya => "lora_unet_down_0_proj_in.lora_down.weight",
        };
        assert_eq!(weights.tensor(expected).unwrap().size(), [3, 7, 1, 1]);
    }
}

#[test]
fn older_names_of_diffusers_are_read() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("old.safetensors");
    let lora = lora("x", 3);
    let mut tensors = BTreeMap::new();
    for (name, pair) in &lora.pairs {
        let stem = name.replace("text_encoder.", "text_encoder.text_model.");
        for (half, tensor) in [("down", &pair.down), ("up", &(&pair.up * pair.scale))] {
            tensors.insert(
                format!("{stem}.lora.{half}.weight"),
                HostTensor::from_tensor(tensor).unwrap(),
            );
        }
    }
    testing::write(&file, &tensors, safetensors::Dtype::F32);
    assert!(apart(&Lora::read(&file, &layers()).unwrap(), &lora) < 1e-6);
}

#[test]
fn tensors_that_match_nothing_or_do_not_fit_are_named() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("bad.safetensors");
    let tensor = |shape: &[usize]| HostTensor {
        shape: shape.to_vec(),
        values: vec![1.0; shape.iter().product()],
    };
    let tensors = BTreeMap::from([
        (
            "unet.down.0.conv1.lora_A.weight".to_owned(),
            tensor(&[2, 7]),
        ),
        ("unet.down.0.to_q.dora_scale".to_owned(), tensor(&[2])),
        ("unet.down.0.to_q.lora_A.weight".to_owned(), tensor(&[2, 7])),
        (
            "unet.down.0.proj_in.lora_A.weight".to_owned(),
            tensor(&[2, 7]),
        ),
        (
            "unet.down.0.proj_in.lora_B.weight".to_owned(),
            tensor(&[5, 3]),
        ),
        (
            "lora_unet_down_0_proj_in.lora_up.weight".to_owned(),
            tensor(&[5, 3]),
        ),
    ]);
    testing::write(&file, &tensors, safetensors::Dtype::F32);
    let complaint = Lora::read(&file, &layers()).unwrap_err().to_string();
    for part in [
        "2 tensors match no layer",
        "unet.down.0.conv1.lora_A.weight",
        "unet.down.0.to_q.dora_scale",
        "unet.down.0.to_q (one half of a pair)",
        "a second spelling",
        "unet.down.0.proj_in (halves of shapes [2, 7] and [5, 3])",
    ] {
        assert!(complaint.contains(part), "{part}: {complaint}");
    }
    testing::write(&file, &BTreeMap::new(), safetensors::Dtype::F32);
    let complaint = Lora::read(&file, &layers()).unwrap_err().to_string();
    assert!(complaint.contains("holds no pair"), "{complaint}");
    fs::write(&file, b"\xff\xff\xff\xff\xff\xff\xff\xff{}").unwrap();
    assert!(Lora::read(&file, &layers()).is_err());
}
