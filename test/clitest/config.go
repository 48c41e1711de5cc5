package clitest

import (
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/renewd/renewd/internal/config"
)

var update = flag.Bool("update", false, "write the document that the test compares")

// Document compares a file in the folder docs with what the code says.
func Document(t *testing.T, name, want string) {
	file := filepath.Join("..", "..", "docs", name)
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != want {
		t.Errorf("%s differs from the code; run this test with -update", file)
	}
}

// Covers checks that a table of fields and its struct have the same fields. A map of the
// struct needs a field with a placeholder, an array one for each element.
func Covers[C any](t *testing.T, fields []config.Field[C]) {
	cfg := new(C)
	rows := map[uintptr]string{}
	values := 0
	for i := range fields {
		f := &fields[i]
		var field any
		if f.Named != nil {
			field = f.Named(cfg, "name")
		} else {
			field = f.Value(cfg)
			values++
		}
		p := reflect.ValueOf(field).Pointer()
		if other, dup := rows[p]; dup {
			t.Errorf("%s and %s are the same field", f.Path, other)
		}
		rows[p] = f.Path
		if !strings.HasSuffix(f.Doc, ".") {
			t.Errorf("%s: documentation %q", f.Path, f.Doc)
		}
	}
	v := reflect.ValueOf(cfg).Elem()
	for i := range v.NumField() {
		name := v.Type().Field(i).Name
		switch field := v.Field(i); field.Kind() {
		case reflect.Map:
			values++
			if field.Len() != 1 {
				t.Errorf("%s has no row", name)
			}
		case reflect.Array:
			values -= field.Len() - 1
			for j := range field.Len() {
				if _, ok := rows[field.Index(j).Addr().Pointer()]; !ok {
					t.Errorf("%s[%d] has no row", name, j)
				}
			}
		default:
			if _, ok := rows[field.Addr().Pointer()]; !ok {
				t.Errorf("%s has no row", name)
			}
		}
	}
	if values != v.NumField() {
		t.Errorf("%d rows for %d fields", values, v.NumField())
	}
}
