"""Operations with a fast form, each beside its plain one."""
