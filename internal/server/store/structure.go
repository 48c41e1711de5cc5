package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
)

// bbolt maps its file into memory and follows the numbers in it. On a damaged
// file it reads past the end, loops for ever or panics in a goroutine of its
// own. If the newer of its two headers is broken, it silently uses the older one,
// which would undo the last commit. So the structure is checked here with plain
// reads before bbolt opens the file, as strictly as bbolt writes it: each page is
// either used once or free, elements have no gaps, keys ascend. A changed bit can
// then affect only unused bytes, and values, which have checksums.
//
// This is version 2 of bbolt's format, in the byte order of the machine.
const (
	boltMagic   = 0xED0CDAED
	boltVersion = 2

	pageHeader = 16 // id uint64, flags and count uint16, overflow uint32
	element    = 16 // branch: pos, ksize uint32, id uint64; leaf: flags, pos, ksize, vsize uint32
	bucketHead = 16 // root page uint64, sequence uint64
	metaSize   = 64 // its last 8 bytes are a checksum of the rest

	flagBranch   = 0x01
	flagLeaf     = 0x02
	flagMeta     = 0x04
	flagFreelist = 0x10

	leafBucket = 0x01
)

var native = binary.NativeEndian

// pages is the file during the check.
type pages struct {
	file  io.ReaderAt
	size  uint64 // of a page
	count uint64 // pages that are free or in use, headers included
	seen  []bool // by page; a page seen twice is an error, so the check ends
}

// page is a page with its overflow.
type page struct {
	id    uint64
	flags uint16
	count int
	body  []byte // after the header
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, args...))
}

// readUsage reads the list of free pages. It does not check the rest.
func readUsage(f *os.File) (usage, error) {
	info, err := f.Stat()
	if err != nil {
		return usage{}, err
	}
	_, freelist, p, err := readMeta(f, uint64(info.Size()))
	if err != nil {
		return usage{}, err
	}
	free, err := p.free(freelist)
	return usage{free: free, count: p.count, pageSize: p.size}, err
}

func checkStructure(f *os.File) (usage, error) {
	info, err := f.Stat()
	if err != nil {
		return usage{}, err
	}
	if info.Size() == 0 {
		return usage{}, errors.New("the file is empty, it is not a store: restore a backup; remove the file only if there never was a store")
	}
	root, freelist, p, err := readMeta(f, uint64(info.Size()))
	if err != nil {
		return usage{}, err
	}
	free, err := p.free(freelist)
	if err != nil {
		return usage{}, err
	}
	if err := p.tree(root, nil, nil, true); err != nil {
		return usage{}, err
	}
	for id, seen := range p.seen {
		if !seen {
			return usage{}, damaged("page %d is neither free nor in use", id)
		}
	}
	return usage{free: free, count: p.count, pageSize: p.size}, nil
}

// readMeta reads both headers. Commits write them in turn.
func readMeta(f io.ReaderAt, length uint64) (root, freelist uint64, p *pages, err error) {
	// The first header has the page size, which is the offset of the second.
	meta := func(id, offset uint64) ([]byte, error) {
		buf := make([]byte, pageHeader+metaSize)
		if _, err := f.ReadAt(buf, int64(offset)); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		m := buf[pageHeader:]
		sum := fnv.New64a()
		sum.Write(m[:metaSize-8])
		if native.Uint32(m) != boltMagic || native.Uint32(m[4:]) != boltVersion || native.Uint64(m[metaSize-8:]) != sum.Sum64() ||
			native.Uint64(buf) != id || native.Uint16(buf[8:]) != flagMeta {
			return nil, damaged("header %d of 2 cannot be read, or it is not a store", id+1)
		}
		return m, nil
	}
	first, err := meta(0, 0)
	if err != nil {
		return 0, 0, nil, err
	}
	size := uint64(native.Uint32(first[8:]))
	if size < 512 || size > 1<<24 || size&(size-1) != 0 {
		return 0, 0, nil, damaged("pages of %d bytes", size)
	}
	second, err := meta(1, size)
	if err != nil {
		return 0, 0, nil, err
	}
	m := first
	if native.Uint64(second[48:]) > native.Uint64(first[48:]) {
		m = second
	}
	p = &pages{file: f, size: size, count: native.Uint64(m[40:])}
	if p.count > length/size {
		return 0, 0, nil, damaged("it was cut off: it has %d bytes of %d pages of %d bytes", length, p.count, size)
	}
	if native.Uint32(second[8:]) != uint32(size) || p.count < 4 {
		return 0, 0, nil, damaged("%d pages of %d bytes", p.count, size)
	}
	p.seen = make([]bool, p.count)
	p.seen[0], p.seen[1] = true, true
	return native.Uint64(m[16:]), native.Uint64(m[32:]), p, nil
}

// take marks pages as used. It fails if one is used already.
func (p *pages) take(id, n uint64) error {
	if id < 2 || id >= p.count || n > p.count-id {
		return damaged("page %d is beyond the end", id)
	}
	for i := id; i < id+n; i++ {
		if p.seen[i] {
			return damaged("page %d is used twice", i)
		}
		p.seen[i] = true
	}
	return nil
}

// read reads a page that has one of the flags.
func (p *pages) read(id uint64, flags uint16) (page, error) {
	if id < 2 || id >= p.count {
		return page{}, damaged("page %d is beyond the end", id)
	}
	head := make([]byte, p.size)
	if _, err := p.file.ReadAt(head, int64(id*p.size)); err != nil {
		return page{}, err
	}
	g := page{id: id, flags: native.Uint16(head[8:]), count: int(native.Uint16(head[10:]))}
	if native.Uint64(head) != id || g.flags&flags == 0 || g.flags&(g.flags-1) != 0 {
		return page{}, damaged("page %d has an unexpected header", id)
	}
	overflow := uint64(native.Uint32(head[12:]))
	if err := p.take(id, 1+overflow); err != nil {
		return page{}, err
	}
	if overflow > 0 {
		head = append(head, make([]byte, overflow*p.size)...)
		if _, err := p.file.ReadAt(head[p.size:], int64((id+1)*p.size)); err != nil {
			return page{}, err
		}
	}
	g.body = head[pageHeader:]
	return g, nil
}

// free marks all pages of the list of free pages and returns their number.
func (p *pages) free(id uint64) (uint64, error) {
	g, err := p.read(id, flagFreelist)
	if err != nil {
		return 0, err
	}
	ids, n := g.body, uint64(g.count)
	if g.count == 0xFFFF {
		ids, n = g.body[8:], native.Uint64(g.body)
	}
	if n > uint64(len(ids))/8 {
		return 0, damaged("page %d has too many elements", id)
	}
	for i := range n {
		if err := p.take(native.Uint64(ids[i*8:]), 1); err != nil {
			return 0, err
		}
	}
	return n, nil
}

// tree checks a page and those below it. Their keys must be at least low and below high;
// nil is no limit.
func (p *pages) tree(id uint64, low, high []byte, top bool) error {
	g, err := p.read(id, flagBranch|flagLeaf)
	if err != nil {
		return err
	}
	if g.count == 0 && (!top || g.flags != flagLeaf) {
		return damaged("page %d is empty", id)
	}
	used, err := p.elements(g, low, high)
	if err != nil {
		return err
	}
	// The body of an empty page is zero. Any other page has no more overflow than its
	// elements need.
	if g.count == 0 && !zero(g.body) || (pageHeader+used+p.size-1)/p.size*p.size != pageHeader+uint64(len(g.body)) {
		return damaged("page %d has lost elements", id)
	}
	return nil
}

func zero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

// elements checks the elements of a page and the pages below. It returns how many bytes
// of the body are used.
func (p *pages) elements(g page, low, high []byte) (used uint64, err error) {
	used = uint64(g.count) * element
	if used > uint64(len(g.body)) {
		return 0, damaged("page %d has too many elements", g.id)
	}
	var keys [][]byte // of a branch
	for i := range g.count {
		e := g.body[i*element:]
		flags, pos, ksize, vsize := uint32(0), native.Uint32(e), native.Uint32(e[4:]), uint32(0)
		if g.flags == flagLeaf {
			flags, pos, ksize, vsize = native.Uint32(e), native.Uint32(e[4:]), native.Uint32(e[8:]), native.Uint32(e[12:])
		}
		end := used + uint64(ksize) + uint64(vsize)
		if uint64(i*element)+uint64(pos) != used || ksize == 0 || end > uint64(len(g.body)) || flags&^leafBucket != 0 {
			return 0, damaged("element %d of page %d", i, g.id)
		}
		key, value := g.body[used:used+uint64(ksize)], g.body[used+uint64(ksize):end]
		used = end
		if low != nil && (bytes.Compare(key, low) < 0 || i > 0 && bytes.Equal(key, low)) || high != nil && bytes.Compare(key, high) >= 0 {
			return 0, damaged("the keys of page %d are not in order", g.id)
		}
		low = key
		if g.flags == flagBranch {
			keys = append(keys, key)
		} else if flags == leafBucket {
			if err := p.bucket(g.id, value); err != nil {
				return 0, err
			}
		}
	}
	for i, key := range keys {
		next := high
		if i+1 < len(keys) {
			next = keys[i+1]
		}
		if err := p.tree(native.Uint64(g.body[i*element+8:]), key, next, false); err != nil {
			return 0, err
		}
	}
	return used, nil
}

// bucket checks a bucket. Its value refers to the root page of a tree or has a leaf page
// inline.
func (p *pages) bucket(id uint64, value []byte) error {
	if len(value) < bucketHead {
		return damaged("a bucket of page %d", id)
	}
	if root := native.Uint64(value); root != 0 {
		if len(value) != bucketHead {
			return damaged("a bucket of page %d", id)
		}
		return p.tree(root, nil, nil, true)
	}
	inline := value[bucketHead:]
	if len(inline) < pageHeader {
		return damaged("a bucket of page %d", id)
	}
	g := page{id: id, flags: native.Uint16(inline[8:]), count: int(native.Uint16(inline[10:])), body: inline[pageHeader:]}
	if native.Uint64(inline) != 0 || g.flags != flagLeaf || native.Uint32(inline[12:]) != 0 {
		return damaged("a bucket of page %d", id)
	}
	used, err := p.elements(g, nil, nil)
	if err == nil && used != uint64(len(g.body)) {
		err = damaged("a bucket of page %d has lost elements", id)
	}
	return err
}
