//! Arrays with values of their own, beside the arrays of every other type's values.

use super::Tried;

#[rustfmt::skip] // One line or two a type.
pub(super) const ARRAYS: &[Tried] = &[
    ("boolean[]", &["'{t,f,NULL}'"]),
    ("integer[]", &["'{}'", "'{1,NULL,-3}'", "'{{1,2},{3,NULL}}'", "'[0:2]={1,2,3}'",
        "'[-1:0][2:3]={{1,2},{3,4}}'", "'{{{{{{1}}}}}}'"]),
    ("numeric[]", &["'{1.0,1.00,NaN,NULL,1e-50}'"]),
    ("text[]", &["'{}'", r#"'{""}'"#, r#"'{NULL,"NULL",null,"null"}'"#,
        r#"ARRAY['a,b', 'c"d', 'e\f', '{g}', ' h ', E'i\nj', 'é🎉', '''', '\"', '{', '}']"#,
        r#"'{{a,b},{c,"d,e"}}'"#, "'[5:6]={x,y}'", "ARRAY[repeat('x', 9000), NULL]",
        "array_fill('many'::text, ARRAY[20000])"]),
    // As many dimensions as there may be are written with one pair of brackets.
    ("bigint[][]", &["'{{9223372036854775807},{9007199254740993}}'", "'{1}'"]),
    ("money[]", &["'{1234.50,-5}'::numeric[]::money[]"]),
    ("json[]", &[r#"ARRAY['null'::json, '{"a": "b,c"}', NULL]"#]),
    ("\"char\"[]", &[r#"'{a,"",",","\\\\"}'"#]),
    // The elements look like arrays themselves, so that ARRAY[..] would make another dimension of them.
    ("int2vector[]", &["'{\"1 -2\",\"3\",NULL}'", "'{}'", "'{{\"1 2\"},{\"3\"}}'", "'[5:6]={\"1 2\",\"3\"}'"]),
    ("oidvector[]", &["'{\"0 4294967295\",\"3\",NULL}'", "'{}'"]),
    ("box[]", &["'{(1,1),(0,0);(2,2),(1,1)}'"]),
];
