package store_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/internal/server/store"
)

const pageSize = 4096

// sample is the file of a store with something of everything, free pages, and
// pages with overflow, without the part at the end that was never used. It was
// put back from a copy.
func sample(t testing.TB) (data []byte, want string) {
	t.Helper()
	path := newPath(t)
	s := open(t, path)
	fill(t, s.Deployment("default"))
	fill(t, s.Deployment("other"))
	d := s.Deployment("default")
	for n := range 20 {
		if err := d.PutEntries(t.Context(), nil, []string{entryID(n)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := update(t.Context(), d, 1, strings.Repeat("long", 3000)); err != nil {
		t.Fatal(err)
	}
	if err := s.SaveFederated(t.Context(), record("partner.example", strings.Repeat("bundle", 1000))); err != nil {
		t.Fatal(err)
	}
	path = copyOf(t, s)
	closed(t, s)
	s = open(t, path)
	if err := s.Deployment("small").PutToken(t.Context(), spireapi.Token{Value: "token"}); err != nil {
		t.Fatal(err)
	}
	want = mustContents(t, s)
	used := s.Used(t)
	closed(t, s)
	return readFile(t, path)[:used], want
}

// look opens a file. It must be refused, and left alone, or hold what it held.
func look(t testing.TB, path string, data []byte, want, what string) (opened bool) {
	t.Helper()
	writeFile(t, path, data)
	o := options()
	s, err := store.Open(path, o)
	if err != nil {
		if !strings.Contains(err.Error(), path) || !errors.Is(err, store.ErrDamaged) && !strings.Contains(err.Error(), "the file is empty") {
			t.Errorf("%s: %v", what, err)
		}
		if !bytes.Equal(data, readFile(t, path)) {
			t.Errorf("%s: the file was changed", what)
		}
		return false
	}
	defer closed(t, s)
	if got := mustContents(t, s); got != want {
		t.Errorf("%s: silently wrong:\n%s\nwant\n%s", what, got, want)
	}
	return true
}

func TestTruncated(t *testing.T) {
	t.Parallel()
	data, want := sample(t)
	path := newPath(t)
	for n := 0; n < len(data); n += 701 {
		if look(t, path, data[:n], want, "cut off") {
			t.Errorf("opened with %d bytes of %d", n, len(data))
		}
	}
	for n := 0; n < len(data); n += pageSize {
		for _, end := range []int{n, n + 1, n + pageSize - 1} {
			if look(t, path, data[:end], want, "cut off") {
				t.Errorf("opened with %d bytes of %d", end, len(data))
			}
		}
	}
	if !look(t, path, data, want, "whole") || !look(t, path, append(bytes.Clone(data), make([]byte, 999)...), want, "longer") {
		t.Error("a good file was refused")
	}
}

// TestFlippedBits changes one bit at a time: each of the bits in the headers,
// which decide most, and many in between.
func TestFlippedBits(t *testing.T) {
	t.Parallel()
	data, want := sample(t)
	path := newPath(t)
	random := rand.New(rand.NewPCG(1, 2))
	noticed, all := 0, 0
	flip := func(at int, bit byte) {
		data[at] ^= bit
		if !look(t, path, data, want, "a bit at "+place(at)) {
			noticed++
		}
		all++
		data[at] ^= bit
	}
	for page := 0; page < len(data); page += pageSize {
		for at := range 16 { // the page's header
			flip(page+at, 1<<random.IntN(8))
		}
		for range 2 {
			flip(page+16+random.IntN(pageSize-16), 1<<random.IntN(8))
			flip(page+16+random.IntN(200), 1<<random.IntN(8)) // the first elements
		}
	}
	for at := range 64 { // both headers of the file
		flip(16+at, 1<<random.IntN(8))
		flip(pageSize+16+at, 1<<random.IntN(8))
	}
	t.Logf("%d of %d changes were noticed, the others changed nothing that is used", noticed, all)
	if noticed < all/4 {
		t.Errorf("only %d of %d changes were noticed", noticed, all)
	}
}

func place(at int) string {
	return fmt.Sprintf("page %d byte %d", at/pageSize, at%pageSize)
}

// TestLostPages overwrites pages with zeros, noise and each other.
func TestLostPages(t *testing.T) {
	t.Parallel()
	data, want := sample(t)
	path := newPath(t)
	random := rand.New(rand.NewPCG(3, 4))
	noise := make([]byte, pageSize)
	for i := range noise {
		noise[i] = byte(random.Uint32())
	}
	for at := 0; at < len(data); at += pageSize {
		other := random.IntN(len(data)/pageSize) * pageSize
		for what, page := range map[string][]byte{"zeros": make([]byte, pageSize), "noise": noise, "another": data[other : other+pageSize]} {
			broken := bytes.Clone(data)
			copy(broken[at:], page)
			look(t, path, broken, want, what+" at "+place(at))
		}
	}
	for n := range 20 {
		garbage := make([]byte, random.IntN(1<<16))
		for i := range garbage {
			garbage[i] = byte(random.Uint32())
		}
		if look(t, path, garbage, want, "garbage") {
			t.Errorf("garbage %d was opened", n)
		}
	}
}

// TestLyingPages changes the numbers in pages that decide what belongs to them.
func TestLyingPages(t *testing.T) {
	t.Parallel()
	data, want := sample(t)
	path := newPath(t)
	le := binary.NativeEndian
	lie := func(page int, what string, change func(b []byte)) {
		t.Helper()
		broken := bytes.Clone(data)
		change(broken[page*pageSize:])
		if look(t, path, broken, want, what) {
			t.Errorf("page %d: %s: opened", page, what)
		}
	}
	const leaf = 0x02
	// A free page may hold anything, also an older list of free pages.
	free := map[int]bool{}
	list := store.FreelistPage(data)
	for i := range int(le.Uint16(data[list*pageSize+10:])) {
		free[int(le.Uint64(data[list*pageSize+16+8*i:]))] = true
	}
	used := 0
	for page := 2; page < len(data)/pageSize; page += 1 + int(le.Uint32(data[page*pageSize+12:])) {
		if free[page] || page == list {
			continue
		}
		used = page
		count := le.Uint16(data[page*pageSize+10:])
		for _, n := range []uint16{0, count - 1, count + 1, 0xffff} {
			lie(page, "another number of elements", func(b []byte) { le.PutUint16(b[10:], n) })
		}
		lie(page, "more overflow", func(b []byte) { b[12]++ })
		lie(page, "huge overflow", func(b []byte) { le.PutUint32(b[12:], 1<<31) })
		if le.Uint16(data[page*pageSize+8:]) == leaf {
			lie(page, "a huge key", func(b []byte) { le.PutUint32(b[16+8:], 1<<31) })
		} else {
			lie(page, "a circle", func(b []byte) { le.PutUint64(b[16+8:], uint64(page)) })
			lie(page, "a page beyond the end", func(b []byte) { le.PutUint64(b[16+8:], 1<<40) })
		}
	}
	lie(list, "a used page is free", func(b []byte) {
		n := le.Uint16(b[10:])
		le.PutUint16(b[10:], n+1)
		le.PutUint64(b[16+8*n:], uint64(used))
	})
	lie(list, "a free page is missing", func(b []byte) { le.PutUint16(b[10:], le.Uint16(b[10:])-1) })
	lie(list, "a huge list", func(b []byte) { le.PutUint16(b[10:], 0xffff); le.PutUint64(b[16:], 1<<62) })
}

// TestCrash stops commits at each moment. Until the header of a commit is on
// the disk, any of its pages may be there or not; the header itself comes when
// all of them are.
func TestCrash(t *testing.T) {
	t.Parallel()
	path, crashed := newPath(t), newPath(t)
	s := open(t, path)
	d := s.Deployment("default")
	fill(t, d)
	random := rand.New(rand.NewPCG(5, 6))
	before, beforeText := readFile(t, path), mustContents(t, s)
	for n := range 6 {
		version := uint64(n) + 3
		doc, err := d.Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		doc.Version, doc.Sequence = version, doc.Sequence+1
		if err := d.Save(t.Context(), doc, keyset.Change{At: start, Operation: "prepare"}); err != nil {
			t.Fatal(err)
		}
		if n%4 == 0 { // a second commit that makes the file grow
			before, beforeText = readFile(t, path), mustContents(t, s)
			if err := update(t.Context(), d, 500+n, strings.Repeat("x", 300_000)); err != nil {
				t.Fatal(err)
			}
		}
		after, afterText := readFile(t, path), mustContents(t, s)
		if beforeText == afterText {
			t.Fatal("nothing has changed")
		}
		header := 0
		if bytes.Equal(before[:pageSize], after[:pageSize]) {
			header = pageSize
		}
		for range 4 {
			// Some pages and not the header.
			torn := bytes.Clone(before)
			if random.IntN(2) == 0 { // the file has grown
				torn = append(torn, make([]byte, len(after)-len(before))...)
			}
			for at := 2 * pageSize; at < len(torn); at += pageSize {
				if random.IntN(2) == 0 {
					copy(torn[at:at+pageSize], after[at:])
				}
			}
			if !look(t, crashed, torn, beforeText, "some pages") {
				t.Error("refused after a crash before the header")
			}
		}
		torn := bytes.Clone(after)
		copy(torn[header:header+pageSize], before[header:])
		if !look(t, crashed, torn, beforeText, "all but the header") || !look(t, crashed, after, afterText, "everything") {
			t.Error("refused after a crash")
		}
		before, beforeText = after, afterText
	}
	closed(t, s)
}

// FuzzOpen changes a good file: at is where data is written over it.
func FuzzOpen(f *testing.F) {
	good, want := sample(f)
	dir := f.TempDir()
	f.Add(uint32(0), []byte("x"))
	f.Add(uint32(pageSize*3+8), []byte{1, 0, 255, 255})
	f.Fuzz(func(t *testing.T, at uint32, data []byte) {
		file, err := os.CreateTemp(dir, "")
		if err != nil {
			t.Fatal(err)
		}
		file.Close()
		defer os.Remove(file.Name())
		broken := bytes.Clone(good)
		copy(broken[int(at)%len(broken):], data)
		look(t, file.Name(), broken, want, filepath.Base(file.Name()))
	})
}
