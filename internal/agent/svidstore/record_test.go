package svidstore_test

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/renewd/renewd/cache"
)

// A restart restores all fields of an entry. With a file of version 0, which lacks some,
// the next sync fetches the entry, and the SVID is still valid for it.
func TestEntryFieldsAreStored(t *testing.T) {
	now := time.Now()
	path := memoryDir(t)
	dir := open(t, path, discard())
	c := cache.New(cache.Config{})
	was, s := addEntry(c, now)
	e := *was
	e.DNSNames, e.X509TTL, e.JWTTTL, e.NoPrefetch, e.IncludeJTI = []string{"a.example.org"}, 2*time.Hour, time.Minute, true, true
	s.TTL = e.X509TTL
	c.Update([]*cache.Entry{&e}, nil)
	put(t, c, s)
	follow(t, dir, c)()
	load := func() (*cache.Entry, *cache.SVID) {
		t.Helper()
		entries, svids, err := dir.Load(now)
		if err != nil || len(entries) != 1 {
			t.Fatalf("Load: %v, %v", entries, err)
		}
		return entries[0], svids[0]
	}
	got, svid := load()
	if !reflect.DeepEqual(got, &e) || svid.TTL != s.TTL || !svid.For(&e) {
		t.Errorf("%+v with the SVID of %v came back as %+v with one of %v", e, s.TTL, got, svid.TTL)
	}

	files, _ := filepath.Glob(path + "/*.json")
	data, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{`"version":1,`, `"dns_names":["a.example.org"],`, `"x509_ttl":7200000000000,`, `"jwt_ttl":60000000000,`,
		`"no_prefetch":true,`, `"include_jti":true,`, `"ttl":7200000000000,`} {
		before := string(data)
		if data = []byte(strings.Replace(before, part, "", 1)); string(data) == before {
			t.Fatalf("no %s in %s", part, before)
		}
	}
	if err := os.WriteFile(files[0], data, 0o600); err != nil {
		t.Fatal(err)
	}
	got, svid = load()
	if got.Revision == e.Revision || !svid.For(&e) {
		t.Errorf("an older file gives revision %d of the entry, and its SVID is for the entry: %v", got.Revision, svid.For(&e))
	}
}
