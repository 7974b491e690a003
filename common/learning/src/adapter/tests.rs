use concord_common::{
    adapter::{InitialScale, decode_f32, encode_f32},
    code::{ErrorCode, Refusal},
};

use super::*;
use crate::head::Head;

fn shape(shared_head: Option<u64>) -> AdapterShape {
    AdapterShape {
        hidden: 6,
        bottleneck: 2,
        layers: vec![1, 4],
        shared_head,
    }
}

fn payload(shape: &AdapterShape) -> Vec<u8> {
    shape
        .initial_payload(InitialScale::default(), Seed(1))
        .unwrap()
}

fn received(shape: &AdapterShape) -> GlobalBase {
    GlobalBase::receive(shape, &payload(shape)).unwrap()
}

fn host<S: Sharing>(adapter: &Adapter<S>) -> NamedTensors {
    adapter.to_host("").unwrap()
}

#[test]
fn a_received_adapter_has_the_payloads_values_in_layout_order() {
    let shape = shape(Some(3));
    let base = received(&shape);
    let adapter = base.adapter(Kind::Float).unwrap();
    let head = base.head(Kind::Float).unwrap().unwrap();
    let mut values = Vec::new();
    for (_, tensor) in adapter.named() {
        values.extend(HostTensor::from_tensor(tensor).unwrap().values);
    }
    for (_, tensor) in head.linear.named("") {
        values.extend(HostTensor::from_tensor(tensor).unwrap().values);
    }
    assert_eq!(encode_f32(&values), payload(&shape));
    assert_eq!(host(&adapter)["layer.4.up.weight"].shape, [6, 2]);
}

#[test]
fn an_untouched_adapter_exports_exact_zeros() {
    let shape = shape(Some(3));
    let base = received(&shape);
    let update = base
        .adapter(Kind::Float)
        .unwrap()
        .export(base.head(Kind::Float).unwrap().as_ref(), &base)
        .unwrap();
    assert_eq!(update.payload().len(), payload(&shape).len());
    assert!(update.payload().iter().all(|byte| *byte == 0));
    assert_eq!(update.base(), base.version());
}

#[test]
fn an_update_is_the_difference_to_the_base_at_its_place_in_the_layout() {
    let shape = shape(None);
    let base = received(&shape);
    let adapter = base.adapter(Kind::Float).unwrap();
    let (_, last) = adapter.named().pop().unwrap();
    let mut last = last.shallow_clone();
    let _ = last.f_add_scalar_(0.5).unwrap();
    let update = adapter.export(None, &base).unwrap();
    let difference = decode_f32(update.payload()).unwrap();
    let (before, changed) = difference.split_at(difference.len() - 6);
    assert!(before.iter().all(|x| *x == 0.0));
    assert_eq!(changed, [0.5; 6]);
}

#[test]
fn a_head_that_does_not_fit_the_layout_is_refused_by_name() {
    let (bare, with_head) = (received(&shape(None)), received(&shape(Some(3))));
    let adapter = bare.adapter(Kind::Float).unwrap();
    let error = adapter.export(None, &with_head).unwrap_err().to_string();
    assert!(error.contains("head.weight"), "{error}");
    let head = with_head.head(Kind::Float).unwrap();
    let error = adapter
        .export(head.as_ref(), &bare)
        .unwrap_err()
        .to_string();
    assert!(error.contains("head.bias"), "{error}");
}

#[test]
fn values_that_are_not_finite_neither_come_in_nor_go_out() {
    let shape = shape(None);
    let mut bad = payload(&shape);
    bad[4..8].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let error = GlobalBase::receive(&shape, &bad).unwrap_err().to_string();
    assert!(error.contains("layer.1.down.weight"), "{error}");

    let base = received(&shape);
    let adapter = base.adapter(Kind::Float).unwrap();
    let (_, first) = adapter.named().remove(0);
    let _ = first.shallow_clone().fill_(f64::NAN);
    assert!(matches!(
        adapter.export(None, &base),
        Err(LearningError::Training(_))
    ));
}

#[test]
fn a_payload_of_another_size_is_refused() {
    let shape = shape(None);
    let cut = &payload(&shape)[4..];
    assert!(matches!(
        GlobalBase::receive(&shape, cut),
        Err(LearningError::Payload(Refusal {
            code: ErrorCode::PayloadSize,
            ..
        }))
    ));
}

#[test]
fn an_independent_private_adapter_follows_from_its_seed() {
    let shape = shape(None);
    let draw = |seed| {
        let adapter = Adapter::<Private>::independent(
            &shape,
            InitialScale::default(),
            Seed(seed),
            Kind::Float,
        );
        host(&adapter.unwrap())
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(
        draw(1)["layer.1.down.weight"],
        draw(2)["layer.1.down.weight"]
    );
    assert_ne!(
        draw(1)["layer.1.down.weight"],
        draw(1)["layer.4.down.weight"]
    );
}

#[test]
fn noise_near_the_global_adapter_is_relative_to_each_tensor() {
    let wide = AdapterShape {
        hidden: 200,
        bottleneck: 20,
        ..shape(None)
    };
    let base = received(&wide);
    let global = base.adapter(Kind::Float).unwrap();
    let near = Adapter::near(&global, 0.1, Seed(3), Kind::Float).unwrap();
    let (global, near) = (host(&global), host(&near));
    let spread = |values: &[f32]| {
        let n = values.len() as f64;
        (values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n).sqrt()
    };
    for name in ["layer.1.down.weight", "layer.1.up.weight"] {
        let noise: Vec<f32> = global[name]
            .values
            .iter()
            .zip(&near[name].values)
            .map(|(g, p)| p - g)
            .collect();
        let relative = spread(&noise) / spread(&global[name].values);
        assert!((relative - 0.1).abs() < 0.01, "{name}: {relative}");
    }
}

#[test]
fn a_private_adapter_survives_its_saved_form_and_shares_no_memory_with_the_global_one() {
    let shape = shape(None);
    let global = received(&shape).adapter(Kind::Float).unwrap();
    let copy = Adapter::<Private>::copy_of(&global).unwrap();
    let saved = copy.to_host("private.").unwrap();
    let (_, first) = global.named().remove(0);
    let _ = first.shallow_clone().fill_(9.0);
    assert_eq!(copy.to_host("private.").unwrap(), saved);
    let mut taker = Taker::new("the test", saved.clone());
    let again = Adapter::<Private>::from_host(&shape, "private.", &mut taker, Kind::Float).unwrap();
    taker.finish().unwrap();
    assert_eq!(again.to_host("private.").unwrap(), saved);
}

#[test]
fn a_private_head_has_small_weights_and_no_bias() {
    let head = Head::draw(5, 400, Seed(1), Kind::Float).unwrap();
    let weight = HostTensor::from_tensor(&head.linear.weight).unwrap();
    let spread = (weight
        .values
        .iter()
        .map(|x| f64::from(*x).powi(2))
        .sum::<f64>()
        / 2000.0)
        .sqrt();
    assert!((spread - 0.02).abs() < 0.002, "{spread}");
    assert_eq!(
        HostTensor::from_tensor(&head.linear.bias).unwrap().values,
        [0.0; 5]
    );
}
