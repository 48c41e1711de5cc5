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

// sample returns the file of a store with values of each kind, free pages and pages with
// overflow, without the unused end. The store was restored from a copy.
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

// openBroken writes and opens a file. Open must reject it and leave it as it is, or the
// store must have the contents want.
func openBroken(t testing.TB, path string, data []byte, want, what string) (opened bool) {
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
		if openBroken(t, path, data[:n], want, "cut off") {
			t.Errorf("opened with %d bytes of %d", n, len(data))
		}
	}
	for n := 0; n < len(data); n += pageSize {
		for _, end := range []int{n, n + 1, n + pageSize - 1} {
			if openBroken(t, path, data[:end], want, "cut off") {
				t.Errorf("opened with %d bytes of %d", end, len(data))
			}
		}
	}
	if !openBroken(t, path, data, want, "whole") || !openBroken(t, path, append(bytes.Clone(data), make([]byte, 999)...), want, "longer") {
		t.Error("a good file was rejected")
	}
}

// TestFlippedBits flips single bits: one in each byte of the headers, and random ones in
// the rest.
func TestFlippedBits(t *testing.T) {
	t.Parallel()
	data, want := sample(t)
	path := newPath(t)
	random := rand.New(rand.NewPCG(1, 2))
	detected, all := 0, 0
	flip := func(at int, bit byte) {
		data[at] ^= bit
		if !openBroken(t, path, data, want, "a bit at "+place(at)) {
			detected++
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
	t.Logf("%d of %d changes were detected, the others were in unused bytes", detected, all)
	if detected < all/4 {
		t.Errorf("only %d of %d changes were detected", detected, all)
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
			openBroken(t, path, broken, want, what+" at "+place(at))
		}
	}
	for n := range 20 {
		garbage := make([]byte, random.IntN(1<<16))
		for i := range garbage {
			garbage[i] = byte(random.Uint32())
		}
		if openBroken(t, path, garbage, want, "garbage") {
			t.Errorf("garbage %d was opened", n)
		}
	}
}

// TestWrongPageHeaders changes the numbers in pages that define their extent.
func TestWrongPageHeaders(t *testing.T) {
	t.Parallel()
	data, want := sample(t)
	path := newPath(t)
	le := binary.NativeEndian
	breakPage := func(page int, what string, change func(b []byte)) {
		t.Helper()
		broken := bytes.Clone(data)
		change(broken[page*pageSize:])
		if openBroken(t, path, broken, want, what) {
			t.Errorf("page %d: %s: opened", page, what)
		}
	}
	const leaf = 0x02
	// A free page may contain anything, also an older list of free pages.
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
			breakPage(page, "another number of elements", func(b []byte) { le.PutUint16(b[10:], n) })
		}
		breakPage(page, "more overflow", func(b []byte) { b[12]++ })
		breakPage(page, "huge overflow", func(b []byte) { le.PutUint32(b[12:], 1<<31) })
		if le.Uint16(data[page*pageSize+8:]) == leaf {
			breakPage(page, "a huge key", func(b []byte) { le.PutUint32(b[16+8:], 1<<31) })
		} else {
			breakPage(page, "a circle", func(b []byte) { le.PutUint64(b[16+8:], uint64(page)) })
			breakPage(page, "a page beyond the end", func(b []byte) { le.PutUint64(b[16+8:], 1<<40) })
		}
	}
	breakPage(list, "a used page is free", func(b []byte) {
		n := le.Uint16(b[10:])
		le.PutUint16(b[10:], n+1)
		le.PutUint64(b[16+8*n:], uint64(used))
	})
	breakPage(list, "a free page is missing", func(b []byte) { le.PutUint16(b[10:], le.Uint16(b[10:])-1) })
	breakPage(list, "a huge list", func(b []byte) { le.PutUint16(b[10:], 0xffff); le.PutUint64(b[16:], 1<<62) })
}

// TestCrash stops commits at every stage. Until the header of a commit is on the disk,
// any of its pages may be missing. The header is written after all of them.
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
			// Some pages without the header.
			torn := bytes.Clone(before)
			if random.IntN(2) == 0 { // the file has grown
				torn = append(torn, make([]byte, len(after)-len(before))...)
			}
			for at := 2 * pageSize; at < len(torn); at += pageSize {
				if random.IntN(2) == 0 {
					copy(torn[at:at+pageSize], after[at:])
				}
			}
			if !openBroken(t, crashed, torn, beforeText, "some pages") {
				t.Error("rejected after a crash before the header")
			}
		}
		torn := bytes.Clone(after)
		copy(torn[header:header+pageSize], before[header:])
		if !openBroken(t, crashed, torn, beforeText, "all but the header") || !openBroken(t, crashed, after, afterText, "everything") {
			t.Error("rejected after a crash")
		}
		before, beforeText = after, afterText
	}
	closed(t, s)
}

// FuzzOpen overwrites a good file with data at the offset at.
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
		openBroken(t, file.Name(), broken, want, filepath.Base(file.Name()))
	})
}
