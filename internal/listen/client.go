package listen

import (
	"net"
	"net/netip"
)

// Client is who comes from an address: an IPv4 address, and of IPv6 a /64: that
// much every machine is given, or can make up, so single addresses would bound
// nobody. It is the zero Prefix for a peer without an IP address, over a Unix
// socket or in memory, whom no limit of addresses applies to.
func Client(address net.Addr) netip.Prefix {
	tcp, ok := address.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip, ok := netip.AddrFromSlice(tcp.IP)
	if !ok {
		return netip.Prefix{}
	}
	ip = ip.Unmap() // IPv4, at a listener for both
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	return netip.PrefixFrom(ip, bits).Masked()
}

// Name is a client for people.
func Name(client netip.Prefix) string {
	if !client.IsValid() {
		return "no IP address"
	}
	return client.String()
}

// siteBits is the size of a [Site].
const siteBits = 48

// Site is the /48 that an IPv6 client is in: what one customer of a provider is
// given, with 65,536 clients in it. It is the zero Prefix for any other client.
func Site(client netip.Prefix) netip.Prefix {
	if !client.IsValid() || client.Addr().Is4() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(client.Addr(), siteBits).Masked()
}
