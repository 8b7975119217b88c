#!/usr/bin/perl
# A client of vmactor's daemon in Perl: MessagePack-RPC over a unix socket, with Data::MessagePack
# (Debian: libdata-messagepack-perl and libdata-messagepack-stream-perl).
#
#   perl vmactor.pl SOCKET list        lists the VMs
#   perl vmactor.pl SOCKET stop CID    stops one
#
# docs/protocol.md describes the protocol. One call at a time, which is enough for a script.

use strict;
use warnings;
use Data::MessagePack;
use Data::MessagePack::Stream;
use IO::Socket::UNIX;

my ($path, $command, $cid) = @ARGV;
die "usage: $0 SOCKET list|stop [CID]\n" unless defined $command;
my $socket = IO::Socket::UNIX->new(Peer => $path) or die "no daemon at $path: $!\n";
my $packer = Data::MessagePack->new->utf8->prefer_integer;
my $stream = Data::MessagePack::Stream->new;
my $last   = 0;

sub call {
    my ($method, @params) = @_;
    my $id = ++$last;
    print {$socket} $packer->pack([0, $id, $method, \@params]);
    $socket->flush;
    while (1) {
        while ($stream->next) {
            my ($kind, $number, $error, $result) = @{ $stream->data };
            next unless $kind == 1 && (!defined $number || $number == $id);    # not a notification
            die "$method: $error->[1] ($error->[0])\n" if defined $error;
            return $result;
        }
        sysread($socket, my $bytes, 65536) or die "the daemon closed the connection\n";
        $stream->feed($bytes);
    }
}

if ($command eq "list") {
    print join("\t", @{$_}{qw(cid name state)}), "\n" for @{ call("listVms") };
}
elsif ($command eq "stop") {
    call("stop", call("openVm", $cid + 0)->{vm});
    print "$cid stopped\n";
}
else {
    die "there is no command $command\n";
}
