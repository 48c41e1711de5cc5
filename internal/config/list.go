package config

import (
	"fmt"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Item is an element of a list that [Schema.LoadList] returns.
type Item[C any] struct {
	Config *C
	Line   int // its first line
}

// LoadList parses a file whose only field, key, is a list of sections with the fields of
// the schema, as strictly as [Schema.Load] parses a configuration. A file without the
// field is an error; an empty list is written as key: []. Schema.Check is called for each
// section. The paths in an error, which is an [Error], have the index of the section, from 0.
func (s *Schema[C]) LoadList(file string, data []byte, key string) ([]Item[C], error) {
	r := &reader{file: file}
	var items []Item[C]
	if root := r.document(data); root != nil {
		r.pairs("", root, 0, func(path string, k, v *yaml.Node) {
			if path != key {
				r.at(k.Line, strconv.Quote(path), "is not a field", "the only one is "+key)
				return
			}
			items = s.items(r, key, k, v)
		})
	}
	if items == nil && len(r.out) == 0 {
		r.at(0, key, "is not set", "write \""+key+": []\" if the list is meant to be empty")
	}
	if len(r.out) > 0 {
		return nil, Error(r.out)
	}
	return items, nil
}

func (s *Schema[C]) items(r *reader, key string, k, v *yaml.Node) []Item[C] {
	switch {
	case v.Kind == yaml.ScalarNode && v.ShortTag() == "!!null":
		r.at(k.Line, key, "has no value", "write \""+key+": []\" if the list is meant to be empty")
		return nil
	case v.Kind != yaml.SequenceNode:
		r.at(k.Line, key, "is not a list", "write each element as \"- name: value\" and its further fields below")
		return nil
	}
	items := make([]Item[C], 0, len(v.Content))
	for i, n := range v.Content {
		path, line := fmt.Sprintf("%s[%d]", key, i), n.Line
		if n.Kind == yaml.AliasNode {
			n = n.Alias
		}
		l := &loader[C]{schema: s, c: s.Defaults(), reader: &reader{file: r.file}, origins: map[string]string{}}
		if n.Kind == yaml.MappingNode {
			l.section("", n, n.Line, 1)
		} else {
			l.at(n.Line, "", "is not a section", "write it as \"- name: value\" and its further fields below")
		}
		if len(l.out) == 0 {
			l.file = l.place(n.Line) // for missing fields
			l.out = l.check()
		}
		for _, p := range l.out {
			p.Path = inItem(path, p.Path)
			r.out = append(r.out, p)
		}
		items = append(items, Item[C]{Config: l.c, Line: line})
	}
	return items
}

// inItem returns the path in a list for a path in its item, which may be empty or quoted.
func inItem(item, path string) string {
	if path == "" {
		return item
	}
	if name, err := strconv.Unquote(path); err == nil && strings.HasPrefix(path, `"`) {
		return strconv.Quote(item + "." + name)
	}
	return item + "." + path
}
