//! The header of a safetensors file, read for its count alone: shapes are multiplied out as they come and everything else is passed over, so that a
//! header takes no more memory than its text, whatever stands in it.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

/// Most dimensions of a tensor; those of models have five at most.
const MOST_DIMENSIONS: usize = 8;

/// The key of what is no tensor.
const METADATA: &str = "__metadata__";

/// How many numbers all tensors of a header hold together.
pub(super) struct Numbers(pub(super) u64);

impl<'de> Deserialize<'de> for Numbers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Tensors)
    }
}

struct Tensors;

impl<'de> Visitor<'de> for Tensors {
    type Value = Numbers;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut tensors: A) -> Result<Numbers, A::Error> {
        let mut sum = 0_u64;
        while let Some(name) = tensors.next_key::<String>()? {
            if name == METADATA {
                tensors.next_value::<IgnoredAny>()?;
            } else {
                sum = sum.saturating_add(tensors.next_value::<Entry>()?.shape.0);
            }
        }
        Ok(Numbers(sum))
    }
}

/// What is said of a tensor, as far as it counts here.
#[derive(Deserialize)]
struct Entry {
    shape: Product,
}

/// The product of a shape's dimensions.
struct Product(u64);

impl<'de> Deserialize<'de> for Product {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Shape)
    }
}

struct Shape;

impl<'de> Visitor<'de> for Shape {
    type Value = Product;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the dimensions of a tensor")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut dimensions: A) -> Result<Product, A::Error> {
        let mut product = 1_u64;
        for _ in 0..MOST_DIMENSIONS {
            let Some(size) = dimensions.next_element::<u64>()? else {
                return Ok(Product(product));
            };
            product = product.saturating_mul(size);
        }
        match dimensions.next_element::<u64>()? {
            None => Ok(Product(product)),
            Some(_) => Err(A::Error::custom(format!(
                "a tensor with more than {MOST_DIMENSIONS} dimensions"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(header: &str) -> Result<u64, String> {
        let read: Result<Numbers, _> = serde_json::from_str(header);
        read.map(|numbers| numbers.0)
            .map_err(|error| error.to_string())
    }

    fn tensor(shape: &str) -> String {
        format!(r#"{{"dtype":"F16","shape":{shape},"data_offsets":[0,8]}}"#)
    }

    #[test]
    fn tensors_are_counted_and_nothing_else() {
        assert_eq!(numbers("{}"), Ok(0));
        let header = format!(
            r#"{{"__metadata__":{{"shape":[9]}},"a":{},"b":{},"c":{}}}"#,
            tensor("[2,3]"),
            tensor("[]"),
            tensor("[1,1,1,1,1,1,1,7]")
        );
        assert_eq!(numbers(&header), Ok(6 + 1 + 7));
        let header = format!(
            r#"{{"a":{0},"b":{0}}}"#,
            tensor("[18446744073709551615,4,4]")
        );
        assert_eq!(numbers(&header), Ok(u64::MAX));
    }

    #[test]
    fn what_is_no_header_is_refused() {
        for header in [
            "",
            "[]",
            "null",
            "{\"a\":3}",
            "{\"a\":{}}",
            &format!("{{\"a\":{}}}", tensor("3")),
            &format!("{{\"a\":{}}}", tensor("[-1]")),
            &format!("{{\"a\":{}}}", tensor("[1.5]")),
            &format!("{{\"a\":{}", tensor("[1]")),
        ] {
            assert!(numbers(header).is_err(), "{header}");
        }
    }

    /// What stands behind the ninth dimension is not even read.
    #[test]
    fn a_shape_of_millions_of_dimensions_is_refused_at_the_ninth() {
        let many = format!("[{}0]", "0,".repeat(3_000_000));
        let refusal = numbers(&format!("{{\"a\":{}}}", tensor(&many))).unwrap_err();
        assert!(refusal.contains("more than 8 dimensions"), "{refusal}");
        let column = refusal.rsplit(' ').next().unwrap();
        assert!(column.parse::<u32>().unwrap() < 60, "{refusal}");
    }

    #[test]
    fn what_is_passed_over_may_be_as_long_and_as_deep_as_the_header() {
        let deep = format!("{}{}", "[".repeat(500_000), "]".repeat(500_000));
        let wide = format!("[{}0]", "{\"a\":0},".repeat(200_000));
        for useless in [deep, wide] {
            let header =
                format!(r#"{{"__metadata__":{useless},"a":{{"more":{useless},"shape":[5]}}}}"#);
            assert_eq!(numbers(&header), Ok(5));
        }
    }

    #[test]
    fn many_small_tensors_are_counted() {
        let entries: Vec<String> = (0..100_000)
            .map(|number| format!(r#""{number}":{}"#, tensor("[4]")))
            .collect();
        assert_eq!(numbers(&format!("{{{}}}", entries.join(","))), Ok(400_000));
    }
}
